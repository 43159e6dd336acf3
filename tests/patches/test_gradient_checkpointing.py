"""Gradient checkpointing: the same bits, fewer bytes, and as few layers as needed."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from helpers.small_models import adapted, ragged, small
from helpers.tiny_training import tiny_data, tiny_peft
from helpers.training_loop import learn
from lorakeet.adapter.peft_model import get_peft_model
from lorakeet.errors import TrainingError
from lorakeet.kernels.cpu.memory import workspace
from lorakeet.lora.config import LoraConfig
from lorakeet.patches.fused_layers import fused_layers
from lorakeet.patches.fused_loss import fused_loss
from lorakeet.patches.gradient_checkpointing import (
    checkpointable_layers,
    gradient_checkpointing,
)
from lorakeet.patches.padding_free import padding_free
from lorakeet.quant.hf_quantizer import Int8Config

LAYERS = 4


def model_with_dropout(kind: str, **changes: Any) -> nn.Module:
    """Return settings with dropout in the adapter and wherever the architecture has it."""
    drops = {
        "attention_dropout": 0.2,
        "dropout": 0.2,
        "hidden_dropout_prob": 0.2,
        "resid_pdrop": 0.2,
        "attn_pdrop": 0.2,
    }
    return adapted(layered(kind, LAYERS, **drops, **changes), lora_dropout=0.3).train()


def layered(kind: str, layers: int, **changes: Any) -> Any:
    """Return a small model with this number of layers, without a cache, as in a training."""
    if kind == "gemma2":
        changes["layer_types"] = ["sliding_attention", "full_attention"] * (layers // 2)
    return small(kind, num_hidden_layers=layers, use_cache=False, **changes)


def loss_and_gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(7)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss = model(**batch, labels=labels).loss
    loss.backward()
    drawn = torch.rand(1)  # later draws do not change
    learned = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(learned) > 2 * LAYERS
    return {"loss": loss.detach(), "drawn": drawn, **learned}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def times_run(model: nn.Module) -> tuple[list[int], list[Any]]:
    layers = checkpointable_layers(model)
    times = [0] * len(layers)

    def count(index: int) -> Any:
        def hook(*_: Any) -> None:
            times[index] += 1

        return hook

    return times, [layer.register_forward_pre_hook(count(index)) for index, layer in enumerate(layers)]


@pytest.mark.parametrize("every", [1, 2, 3, 9])
@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
@pytest.mark.parametrize("kind", ["bert", "gemma2", "gpt2", "llama", "opt", "qwen3"])
def test_loss_gradients_and_random_numbers_are_the_same_bits(kind: str, fast: bool, every: int) -> None:
    model = model_with_dropout(kind)
    with ExitStack() as around:
        if fast:
            for context in (padding_free, fused_loss, fused_layers):
                around.enter_context(context(model))
        expected = loss_and_gradients(model, ragged())
        times, handles = times_run(model)
        with gradient_checkpointing(model, every):
            found = loss_and_gradients(model, ragged())
            assert times == [2 if index % every == 0 else 1 for index in range(LAYERS)]
        times[:] = [0] * LAYERS
        assert_equal(found, expected)
        assert_equal(loss_and_gradients(model, ragged()), expected)
        assert times == [1] * LAYERS
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("every", [1, 2, 3])
def test_on_a_base_in_8_bits(every: int, tmp_path: Any) -> None:
    small("llama", num_hidden_layers=LAYERS, hidden_size=64, intermediate_size=96).save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=Int8Config())
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.2)).train()
    with padding_free(model), fused_loss(model), fused_layers(model):
        expected = loss_and_gradients(model, ragged())
        with gradient_checkpointing(model, every):
            assert_equal(loss_and_gradients(model, ragged()), expected)


@pytest.mark.parametrize("every", [1, 2])
def test_training_with_joined_micro_batches_gives_the_same_bits(every: int, make_args: Any, collator: Any) -> None:
    def trained(every: int | None) -> dict[str, Tensor]:
        model = tiny_peft(0.2)
        with ExitStack() as around:
            if every is not None:
                around.enter_context(gradient_checkpointing(model, every))
            learn(model, make_args(gradient_accumulation_steps=4), tiny_data(), collator, 1000)
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    assert_equal(trained(every), trained(None))


def test_layers_below_the_lowest_adapter_do_not_run_again() -> None:
    model = get_peft_model(
        small("llama", num_hidden_layers=LAYERS), LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[2])
    ).train()
    times, _ = times_run(model)
    with gradient_checkpointing(model):
        embedded: list[Tensor] = []
        model.get_input_embeddings().register_forward_hook(lambda _, __, output: embedded.append(output))
        model(**ragged()).logits.sum().backward()
        assert times == [1, 1, 2, 2] and not embedded[0].requires_grad
        assert model.is_gradient_checkpointing
    assert not model.is_gradient_checkpointing


def test_models_without_checkpointable_layers_are_refused() -> None:
    with (
        pytest.raises(TrainingError, match=r"Linear has no layers that can be checkpointed"),
        gradient_checkpointing(nn.Linear(2, 2)),
    ):
        pass


# ---- how much is kept -----------------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """Peak of the bytes in storages allocated inside the context; the workspace of a thread is reused."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        stays = (*model.parameters(), *model.buffers(), workspace(0, torch.float32))
        self.weights = {t.untyped_storage()._cdata for t in stays}
        self.sizes: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.weights:
                storage = tensor.untyped_storage()
                self.sizes[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.sizes = {number: kept for number, kept in self.sizes.items() if not kept[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.sizes.values()))
        return made


def test_inputs_of_layers_share_a_buffer_and_layers_are_restored() -> None:
    model = adapted(layered("llama", LAYERS)).train()
    layers = checkpointable_layers(model)
    given: list[Tensor] = []
    for layer in layers:
        layer.input_layernorm.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    with gradient_checkpointing(model, 2):
        for _ in range(2):
            model(**ragged())  # without a backward pass, whose layers would be seen again
            inside = {t.untyped_storage().data_ptr() for t in given[::2]}
            assert len(inside) == 1 and given[0].untyped_storage().nbytes() >= 2 * given[0].nbytes
            assert given[2].data_ptr() >= given[0].data_ptr() + given[0].nbytes and not given[2]._is_view()
            assert given[1].untyped_storage().data_ptr() not in inside
            memory = StorageWeakRef(given[0].untyped_storage())
            given.clear()
            assert memory.expired()
        short = {name: rows[:, :3] for name, rows in ragged().items()}
        model(**short), model(**ragged())  # passes of other sizes get other buffers
        functions = [layer._gradient_checkpointing_func for layer in layers]
    assert [f is layer._gradient_checkpointing_func for f, layer in zip(functions, layers, strict=True)] == [
        False,
        True,
    ] * 2
    plain = loss_and_gradients(model, ragged())
    with gradient_checkpointing(model):
        again = loss_and_gradients(model, ragged())
    for name, value in plain.items():
        assert torch.equal(value, again[name]), name
