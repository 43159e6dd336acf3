"""The compiled pass of the engine: as the plain pass, the same bits in any company, and plain where it must be."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers as tf

from helpers.tiny import shake
from lorakeet.adapter.peft_model import get_peft_model
from lorakeet.inference.fast_decode import fast_decode
from lorakeet.kernels import paged
from lorakeet.lora.config import LoraConfig
from lorakeet.quant.quantize import quantize_
from lorakeet.serve.cache.pages import Pages
from lorakeet.serve.compiled import CompiledForward, compiled_forward
from lorakeet.serve.engine.forward import Piece, PlainForward, Sequence
from lorakeet.serve.engine.residents import Resident

pytestmark = pytest.mark.skipif(not paged.is_available(), reason="nothing is compiled on this machine")
SHAPE = {"vocab_size": 61, "hidden_size": 40, "intermediate_size": 43, "num_hidden_layers": 2, "head_dim": 16}
SHAPE |= {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": None,
    "pad_token_id": 1,
    "bos_token_id": 0,
}
FAMILIES: dict[str, Any] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SHAPE, mlp_bias=True, attention_bias=True)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**SHAPE, sliding_window=None, tie_word_embeddings=True)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**{**SHAPE, "head_dim": 10, "hidden_size": 64})),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**SHAPE)),
}
#: Settings of adapters of mixed rank, two of which change outputs further, and of one that the loops cannot compute.
ADAPTERS: dict[str, dict[str, Any]] = {
    "first": {"r": 3, "lora_alpha": 9, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "second": {"r": 9, "use_rslora": True, "target_modules": "all-linear"},
    "third": {"r": 16, "lora_dropout": 0.3, "target_modules": ["gate_proj", "o_proj"]},
    "scaled": {"r": 2, "use_dora": True, "target_modules": ["q_proj", "up_proj", "down_proj"]},
    "biased": {"r": 5, "lora_bias": True, "target_modules": ["k_proj", "gate_proj"]},
    "other": {"r": 2, "target_modules": ["q_proj", "embed_tokens"]},
}


def make(family: str) -> Any:
    torch.manual_seed(0)
    model = FAMILIES[family]().eval().requires_grad_(False)
    for parameter in model.parameters():  # biases and norms start at 0 and 1 everywhere, small weights make all alike
        parameter.copy_(parameter * 5 if parameter.ndim > 1 else parameter + 0.3 * torch.randn_like(parameter))
    quantize_(model)
    return model


def pool(model: Any, count: int = 40) -> Pages:
    config = model.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Pages(config.num_hidden_layers, count, config.num_key_value_heads, 16, dim)


@pytest.fixture(scope="module")
def adapted() -> tuple[Any, dict[str, Resident]]:
    """A model whose linear layers have biases with adapters, as residents."""
    model, residents = make("llama"), {}
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        config = LoraConfig(**settings, task_type="CAUSAL_LM")
        if residents:
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, name)
        shake(model, name, seed=seed + 1)
        residents[name] = Resident(name, 1, name, name)
    return model.eval(), residents


def tokens(length: int, seed: int) -> list[int]:
    return torch.randint(2, 61, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def prompts(residents: dict[str, Resident]) -> list[tuple[Resident | None, list[int]]]:
    """Build prompts of many lengths; base rows stand between those of the adapters."""
    names = [None, "first", None, "second", "first", "third", "second", None, "scaled", "biased", "scaled", "other"]
    return [
        (None if name is None else residents[name], tokens(length, length))
        for name, length in zip(names, (1, 40, 17, 33, 2, 16, 64, 20, 21, 18, 3, 19), strict=True)
    ]


def logits(forward: Any, given: list[tuple[Resident | None, list[int]]], sizes: list[int]) -> torch.Tensor:
    """Compute prompts together, in pieces of at most ``sizes[i]`` tokens in turn; the last logits of each."""
    pages = forward.pages
    sequences = [Sequence(adapter, pages.take(pages.needed(len(ids)))) for adapter, ids in given]
    made = [torch.empty(0)] * len(given)
    for turn in range(100):
        size = sizes[turn % len(sizes)]
        chosen = [number for number, (_, ids) in enumerate(given) if sequences[number].length < len(ids)]
        if not chosen:
            break
        pieces = [Piece(sequences[number], given[number][1][sequences[number].length :][:size]) for number in chosen]
        for number, piece, row in zip(chosen, pieces, forward.run(pieces), strict=True):
            made[number] = row
            sequences[number].length += len(piece.ids)
    for sequence in sequences:
        for page in sequence.pages:
            pages.release(page)
    return torch.stack(made)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_logits_are_near_those_of_the_model(family: str) -> None:
    model = make(family)
    forward = compiled_forward(model, pool(model))
    assert isinstance(forward, CompiledForward)
    given: list[tuple[Resident | None, list[int]]] = [(None, tokens(length, length)) for length in (17, 18, 33, 50)]
    found = logits(forward, given, [64])
    for row, (_, ids) in zip(found, given, strict=True):
        with torch.no_grad():
            wanted = model(input_ids=torch.tensor([ids])).logits[0, -1]
        assert float((row - wanted).abs().max()) < 2e-3 * float(wanted.abs().max())


def test_every_adapter_is_as_the_plain_pass_computes_it(adapted: tuple[Any, dict[str, Resident]]) -> None:
    model, residents = adapted
    given = prompts(residents)
    compiled, plain = CompiledForward(model, pool(model)), PlainForward(model, pool(model))
    found, wanted = logits(compiled, given, [64]), logits(plain, given, [64])
    assert [one.name for one, table in compiled.tables.items() if table is None] == ["other"]
    near = 2e-3 * wanted.abs().amax(1)
    assert bool(((found - wanted).abs().amax(1) < near).all())
    bare = logits(compiled, [(None, ids) for _, ids in given], [64])
    heard = [adapter is not None for adapter, _ in given]
    assert ((found - bare).abs().amax(1) > 3 * near).tolist() == heard


def test_bits_do_not_depend_on_company_or_pieces(adapted: tuple[Any, dict[str, Resident]]) -> None:
    model, residents = adapted
    given = [one for one in prompts(residents) if one[0] is not residents["other"]]
    forward = CompiledForward(model, pool(model))
    alone = torch.cat([logits(forward, [one], [64]) for one in given])
    for sizes in ([64], [1], [5, 16, 1]):
        assert torch.equal(logits(forward, given, sizes), alone)
    assert torch.equal(logits(forward, given[::-1], [7]), alone.flip(0))
    assert forward.run([]).shape == (0, 61)


@pytest.mark.parametrize("name", [None, "second", "scaled", "biased"])
def test_generate_has_the_same_bits(adapted: tuple[Any, dict[str, Resident]], name: str | None) -> None:
    """For a text alone and for a padded batch."""
    model, residents = adapted
    forward = CompiledForward(model, pool(model))
    texts, count = [tokens(21, 1), tokens(4, 2)], 5
    adapter = None if name is None else residents[name]
    if name is not None:
        model.set_adapter(name)
    with fast_decode(model), torch.inference_mode(), nullcontext() if name else model.disable_adapter():
        for batch in ([texts[0]], [texts[1]], texts):
            ids = torch.tensor([[1] * (max(map(len, batch)) - len(one)) + one for one in batch])
            wanted = model.generate(
                **{"input_ids": ids, "attention_mask": (ids != 1).long(), "do_sample": False, "max_new_tokens": count},
                **{"output_logits": True, "return_dict_in_generate": True},
            )
            for text, sequence, rows in zip(batch, wanted.sequences, torch.stack(wanted.logits, 1), strict=True):
                written = sequence[-count:].tolist()
                given = [(adapter, text + written[:at]) for at in range(count)]
                assert torch.equal(rows, torch.cat([logits(forward, [one], [64]) for one in given]))


def test_memory_of_an_adapter_goes_with_it(adapted: tuple[Any, dict[str, Resident]]) -> None:
    model, residents = adapted
    forward = CompiledForward(model, pool(model))
    passing = Resident("first", 2, "first", "other")
    logits(forward, [(passing, [5, 6]), (residents["second"], [7])], [4])
    assert len(forward.tables) == 2
    del passing
    assert list(forward.tables) == [residents["second"]]


@pytest.mark.parametrize("family", ["qwen2", "unquantized"])
def test_other_models_take_the_plain_pass(family: str) -> None:
    """Heads whose width is no multiple of 16, and weights in full precision."""
    model = make("qwen2") if family == "qwen2" else FAMILIES["llama"]()
    assert type(compiled_forward(model, pool(model))) is PlainForward


def test_a_model_that_computes_something_else_takes_the_plain_pass(capfd: pytest.CaptureFixture[str]) -> None:
    model = make("llama")
    own = model.model.layers[1].mlp.forward
    model.model.layers[1].mlp.forward = lambda x: own(x) * 1.1
    assert type(compiled_forward(model, pool(model))) is PlainForward
    model = make("llama")
    model.model.norm.weight.mul_(1.0)
    model.config.vocab_size = 61
    model.model.rotary_emb.rope_type = "dynamic"
    assert type(compiled_forward(model, pool(model))) is PlainForward
