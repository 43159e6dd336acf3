"""Decoder layers as one operation compute the bits of their modules, and only where they can."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.small_models import outcome, ragged, small
from helpers.tiny import shake
from lorakeet.adapter.peft_model import get_peft_model
from lorakeet.kernels.cpu import bindings, features
from lorakeet.kernels.cpu.features import Feature
from lorakeet.kernels.fixed_order import fixed_order
from lorakeet.kernels.int8 import registry
from lorakeet.lora.config import LoraConfig
from lorakeet.patches import fused_decoder as module
from lorakeet.patches.fused_layers import fused_layers
from lorakeet.patches.gradient_checkpointing import gradient_checkpointing
from lorakeet.patches.padding_free import padding_free
from lorakeet.quant.half import half_layer
from lorakeet.quant.quantize import quantize_

pytestmark = pytest.mark.skipif(
    bindings.library() is None or not features.has(Feature.AVX2), reason="the compiled layer needs AVX2"
)
#: Widths that fill no tile and no group, and six heads of which three share keys.
SHAPE = {
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
ATTENTION, EVERY = ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def model_of(kind: str = "llama", bits: int | None = None, stored: torch.dtype | None = None, **lora: Any) -> Any:
    """Return a small model in training, with an adapter that is not zero."""
    base = small(kind, **SHAPE).requires_grad_(False)
    for name, inner in list(base.named_modules()) if stored else ():
        if isinstance(inner, nn.Linear):
            base.set_submodule(name, half_layer(inner, inner.weight.detach().to(stored)))
    if bits:
        quantize_(base, form="int8" if bits == 8 else "nf4")
    made = get_peft_model(base, LoraConfig(**{"r": 5, "lora_dropout": 0.3, "target_modules": EVERY, **lora}))
    shake(made)
    return made.train()


@contextmanager
def one_by_one() -> Iterator[None]:
    """Run decoder layers module by module inside of :func:`fused_layers`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "fused_decoders", lambda model: [])
        yield


@contextmanager
def counted_layers() -> Iterator[list[int]]:
    """Yield a list that grows by one for each layer that runs as one operation."""
    calls: list[int] = []
    own = module.decoder_layer

    def counted(*args: Any) -> Tensor:
        calls.append(1)
        return own(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "decoder_layer", counted)
        yield calls


def run(
    model: Any, batch: dict[str, Tensor], every: int = 0, around: Callable[[], Any] | None = None
) -> dict[str, Tensor]:
    """Return logits and gradients of a pass as a training runs it, and how many layers ran as one operation."""
    with ExitStack() as inside:
        for each in (fixed_order(), padding_free(model), fused_layers(model)):
            inside.enter_context(each)
        if every:
            inside.enter_context(gradient_checkpointing(model, every))
        if around is not None:
            inside.enter_context(around())
        calls = inside.enter_context(counted_layers())
        torch.manual_seed(3)
        found = outcome(model, batch)
    return {**found, "layers": torch.tensor(len(calls))}


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in found.keys() - {"layers"}:
        assert torch.equal(found[name], expected[name]), name


CASES = {
    "fp32": {},
    "int8": {"bits": 8},
    "bf16": {"stored": torch.bfloat16, "target_modules": ["q_proj", "up_proj", "down_proj"]},
    "fp16": {"stored": torch.float16, "kind": "qwen2", "lora_dropout": 0.0},
    "biases": {"kind": "qwen2", "bits": 8},
    "a window": {"kind": "mistral"},
    "only attention, no dropout": {"bits": 8, "target_modules": ATTENTION, "lora_dropout": 0.0},
    "only below attention": {"target_modules": ["o_proj", "down_proj"]},
    "a high rank": {"bits": 8, "r": 70, "lora_dropout": 0.0},
    "one layer": {"target_modules": ["up_proj", "down_proj"], "layers_to_transform": [1]},
    "a frozen A": {"bits": 8, "init_lora_weights": False, "frozen": "lora_A"},
    "a trained embedding": {"embedding": True},
}


@pytest.mark.parametrize("case", CASES)
def test_the_bits_are_those_of_the_modules(case: str) -> None:
    settings: dict[str, Any] = dict(CASES[case])
    frozen, embedding = settings.pop("frozen", None), settings.pop("embedding", False)
    model = model_of(**settings)
    for name, parameter in model.named_parameters():
        if frozen and frozen in name:
            parameter.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(embedding)
    batch = ragged()
    found = run(model, batch)
    with one_by_one():
        expected = run(model, batch)
    assert found["layers"] == 2 and expected["layers"] == 0
    assert_same_bits(found, expected)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_a_base_in_16_bits_computes_what_it_does_in_fp32(stored: torch.dtype) -> None:
    model, wide, batch = model_of(stored=stored), model_of(), ragged()
    for inner in wide.modules():
        if isinstance(inner, nn.Linear) and not inner.weight.requires_grad:
            inner.weight.data = inner.weight.data.to(stored).float()
    assert_same_bits(run(model, batch), run(wide, batch))


@pytest.mark.parametrize("product", ["pairs", "vnni", "amx"])
def test_every_product_of_int8(product: str) -> None:
    if registry.missing(registry.named(product)) is not None:
        pytest.skip(f"this machine cannot run {product}")
    model, batch = model_of(bits=8), ragged()
    with registry.using(product):
        found = run(model, batch)
        with one_by_one():
            expected = run(model, batch)
    assert found["layers"] == 2
    assert_same_bits(found, expected)


@pytest.mark.parametrize("every", [1, 2])
def test_layers_that_run_again_compute_the_same_bits(every: int) -> None:
    model, batch = model_of(bits=8), ragged()
    assert_same_bits(run(model, batch, every), run(model, batch))


def test_a_layer_that_runs_again_leaves_its_output_out() -> None:
    model, outputs = model_of(), []
    own = module.decoder_layer

    @contextmanager
    def seen() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "decoder_layer", lambda *args: outputs.append(args[-1]) or own(*args))
            yield

    with padding_free(model), fused_layers(model), gradient_checkpointing(model), seen():
        outcome(model, ragged())
    assert outputs == [True, True, True, False]  # the last layer has a hook, which reads its output


@pytest.mark.parametrize("lengths", [[17], [1] * 20, [5, 12]])
def test_other_rows(lengths: list[int]) -> None:
    model, batch = model_of(), ragged(lengths=lengths)
    found = run(model, batch)
    with one_by_one():
        assert_same_bits(found, run(model, batch))
    assert found["layers"] == 2


def test_few_tokens_run_module_by_module() -> None:
    model, batch = model_of(bits=8), ragged(lengths=[1, 7])
    assert run(model, batch)["layers"] == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("bits", [None, 8])
def test_values_that_are_not_finite_pass_through(value: float, bits: int | None) -> None:
    model, batch = model_of(bits=bits, lora_dropout=0.0), ragged()
    model.get_input_embeddings().weight = nn.Parameter(torch.randn(61, 96), requires_grad=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[43, 3] = value  # the first id of the batch
    found = run(model, batch)
    with one_by_one():
        expected = run(model, batch)
    assert found["layers"] == 2
    for name in found.keys() - {"layers"}:
        assert torch.equal(found[name].isfinite(), expected[name].isfinite()), name
    assert not found["logits"].isfinite().all()


def test_the_number_of_threads_changes_no_bit() -> None:
    model, batch, found = model_of(bits=8), ragged(lengths=[40, 61, 3]), []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(run(model, batch))
    torch.set_num_threads(before)
    assert_same_bits(found[1], found[0])
    assert_same_bits(found[2], found[0])


def test_a_second_backward_pass_reads_what_the_first_has_read() -> None:
    model = model_of()
    learnt = next(p for p in model.parameters() if p.requires_grad)
    with padding_free(model), fused_layers(model):
        loss = model(**ragged()).logits.square().sum()
        first = torch.autograd.grad(loss, learnt, retain_graph=True)
        model(**ragged()).logits.square().sum().backward()  # takes other buffers
        second = torch.autograd.grad(loss, learnt)
    assert torch.equal(first[0], second[0])


def hooked(name: str, register: str) -> Callable[[Any], Any]:
    def change(model: Any) -> Any:
        layers = model.base_model.model.model.layers
        return [getattr(layer.get_submodule(name), register)(lambda *args: None) for layer in layers]

    return change


def trained_norm(model: Any) -> None:
    for layer in model.base_model.model.model.layers:
        layer.input_layernorm.weight.requires_grad_(True)


def another_forward(model: Any) -> None:
    for layer in model.base_model.model.model.layers:
        own = layer.mlp.up_proj.forward
        layer.mlp.up_proj.forward = lambda *args, own=own: own(*args)


def dropped_scores(model: Any) -> None:
    for layer in model.base_model.model.model.layers:
        layer.self_attn.attention_dropout = 0.1


def another_activation(model: Any) -> None:
    for layer in model.base_model.model.model.layers:
        layer.mlp.act_fn = nn.GELU()


def second_adapter(model: Any) -> None:
    model.add_adapter("second", LoraConfig(r=2, target_modules=ATTENTION))
    model.base_model.set_adapter(["default", "second"])


MLP = ["gate_proj", "up_proj", "down_proj"]
APART: dict[str, tuple[dict[str, Any], Callable[[Any], Any]]] = {
    "a hook on a projection": ({}, hooked("self_attn.q_proj", "register_forward_hook")),
    "a hook on an MLP": ({}, hooked("mlp", "register_forward_pre_hook")),
    "a hook on a norm": ({}, hooked("input_layernorm", "register_full_backward_hook")),
    "a hook on a base layer": ({}, hooked("mlp.down_proj.base_layer", "register_forward_hook")),
    "a trained norm": ({}, trained_norm),
    "another forward": ({}, another_forward),
    "dropped scores": ({}, dropped_scores),
    "another activation": ({}, another_activation),
    "two adapters": ({}, second_adapter),
    "DoRA": ({"use_dora": True}, lambda model: None),
    "NF4": ({"bits": 4}, lambda model: None),
    "another family": ({"kind": "qwen3"}, lambda model: None),
    "a trained copy of the network": ({"target_modules": ATTENTION, "modules_to_save": ["mlp"]}, lambda model: None),
    "a trained copy of attention": ({"target_modules": MLP, "modules_to_save": ["self_attn"]}, lambda model: None),
}


@pytest.mark.parametrize("case", APART)
def test_what_one_operation_cannot_compute_runs_module_by_module(case: str) -> None:
    settings, change = APART[case]
    model = model_of(**settings)
    change(model)
    found = run(model, ragged())
    with one_by_one():
        expected = run(model, ragged())
    assert found["layers"] == 0
    if case != "dropped scores":  # drawn from another generator
        assert_same_bits(found, expected)


def test_a_layer_that_is_hooked_later_runs_module_by_module() -> None:
    model = model_of()

    @contextmanager
    def later() -> Iterator[None]:
        layer = model.base_model.model.model.layers[1].mlp
        with layer.register_forward_hook(lambda *args: None):
            yield

    assert run(model, ragged(), around=later)["layers"] == 1
    assert run(model, ragged())["layers"] == 2


def layers_of(model: Any) -> Any:
    return model.base_model.model.model.layers


def each_linear(model: Any, name: str) -> list[Any]:
    return [layer.get_submodule(name) for layer in layers_of(model)]


def moved_weights(model: Any) -> None:
    for projection in each_linear(model, "mlp.up_proj"):
        projection.base_layer.weight.data = projection.base_layer.weight.data.clone().neg_()


def another_rank(model: Any) -> None:
    for projection in each_linear(model, "self_attn.q_proj"):
        a, b = projection.pair("default")
        a.weight.data, b.weight.data = a.weight.data[:3].clone(), b.weight.data[:, :3].clone()


def another_scaling(model: Any) -> None:
    for projection in each_linear(model, "mlp.down_proj"):
        projection.scaling["default"] *= 3


def another_dropout(model: Any) -> None:
    for projection in each_linear(model, "self_attn.v_proj"):
        projection.lora_dropout["default"].p = 0.6


def another_norm(model: Any) -> None:
    for norm in each_linear(model, "input_layernorm"):
        norm.variance_epsilon = 0.5


def no_bias_in_place(model: Any) -> None:
    with torch.no_grad():
        for projection in each_linear(model, "self_attn.k_proj"):
            projection.base_layer.bias.zero_()


def frozen_a(model: Any) -> None:
    for projection in each_linear(model, "mlp.gate_proj"):
        projection.pair("default")[0].weight.requires_grad_(False)


#: Changes between two passes, and the layers that run as one operation in the second one.
LATER: dict[str, tuple[Callable[[Any], Any], int]] = {
    "moved weights": (moved_weights, 2),
    "another rank": (another_rank, 2),
    "another scaling": (another_scaling, 2),
    "another dropout": (another_dropout, 2),
    "another norm": (another_norm, 2),
    "a bias in place": (no_bias_in_place, 2),
    "a frozen A": (frozen_a, 2),
    "a trained norm": (trained_norm, 0),
}


@pytest.mark.parametrize("case", LATER)
def test_what_changes_between_passes_is_seen(case: str) -> None:
    change, layers = LATER[case]
    found = []
    for way in (nullcontext, one_by_one):
        model = model_of("qwen2", bits=None)

        @contextmanager
        def later(model: Any = model) -> Iterator[None]:
            outcome(model, ragged())
            model.zero_grad()
            change(model)
            yield

        with way():
            found.append(run(model, ragged(), around=later))
    assert found[0]["layers"] == layers
    assert_same_bits(*found)


def test_another_product_between_passes_is_seen() -> None:
    found = []
    for way in (nullcontext, one_by_one):
        model = model_of(bits=8)

        @contextmanager
        def later(model: Any = model) -> Iterator[None]:
            outcome(model, ragged())
            model.zero_grad()
            with registry.using("pairs"):
                yield

        with registry.using("vnni"), way():
            found.append(run(model, ragged(), around=later))
    assert_same_bits(*found)


def test_outside_of_packed_rows_nothing_changes() -> None:
    model = model_of()
    with fused_layers(model):
        assert not any("forward" in layer.__dict__ for layer in layers_of(model))


@pytest.mark.parametrize("bits", [None, 8])
def test_an_evaluation_runs_layers_as_one_operation_and_leaves_them_as_they_were(bits: int | None) -> None:
    model = model_of(bits=bits).eval()
    with torch.no_grad(), padding_free(model), fused_layers(model):
        before = [layer.forward for layer in layers_of(model)]
        with module.fused_decoder_layers(model), counted_layers() as calls:
            found = model(**ragged()).logits
        assert [layer.forward for layer in layers_of(model)] == before
    own = model(**ragged()).logits
    real = ragged()["attention_mask"].bool()
    torch.testing.assert_close(found[real], own[real], atol=1e-3 if bits else 1e-5, rtol=1e-4)
    assert len(calls) == 2
    with padding_free(model), fused_layers(model), counted_layers() as calls:
        model(**ragged())
    assert not calls  # a gradient may be wanted, and in evaluation mode that is rare


def test_a_layer_that_differs_stays_unpatched(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of()
    own = module.decoder_layer
    monkeypatch.setattr(module, "decoder_layer", lambda layer, x, *args: own(layer, x, *args) + x / 8)
    with padding_free(model), fused_layers(model):
        assert not any("forward" in layer.__dict__ for layer in model.base_model.model.model.layers)
    assert "LlamaDecoderLayer does not match its patch and stays unpatched" in caplog.text
