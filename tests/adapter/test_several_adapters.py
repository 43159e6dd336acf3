"""Several adapters on one base: mixed batches and weighted sums, compared with PEFT and with each adapter alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from helpers.tiny import EMBEDDING, LINEARS, TASK, make, shake, token_ids
from lorakeet import LoraConfig, PeftModel, get_peft_model
from lorakeet.errors import AdapterError

pytestmark = pytest.mark.filterwarnings("ignore")
ROWS = ["b", "__base__", "a", "c", "a"]


def chosen(architecture: str, **more: Any) -> dict[str, Any]:
    first, second, third = LINEARS[architecture]
    settings = {"r": 3, "lora_alpha": 5, "target_modules": [first, second, third], "task_type": TASK[architecture]}
    return {**settings, **({"fan_in_fan_out": True} if architecture == "gpt2" else {}), **more}


def both(architecture: str, folder: Path) -> tuple[PeftModel, peft.PeftModel]:
    """Build the same three adapters, of different layers and ranks, on the same base in two libraries."""
    variants = {
        "a": chosen(architecture),
        "b": chosen(architecture, r=2, target_modules=[LINEARS[architecture][0], EMBEDDING[architecture]]),
        "c": chosen(architecture, r=5, lora_alpha=2, use_rslora=True),
    }
    ours: Any = None
    for name, settings in variants.items():
        one = get_peft_model(make(architecture), LoraConfig(**settings))
        shake(one, seed=ord(name))
        one.save_pretrained(folder / name)
        if ours is None:
            ours = PeftModel.from_pretrained(make(architecture), folder / name, adapter_name=name)
            theirs = peft.PeftModel.from_pretrained(make(architecture), folder / name, adapter_name=name)
        else:
            ours.load_adapter(folder / name, name)
            theirs.load_adapter(folder / name, name)
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize("architecture", LINEARS)
def test_each_row_has_its_own_adapter(architecture: str, tmp_path: Path) -> None:
    ours, theirs = both(architecture, tmp_path)
    ids = token_ids(rows=5)
    mixed = ours(input_ids=ids, adapter_names=ROWS).logits
    if architecture != "opt":  # whose feed-forward network peft cannot tell the rows of
        torch.testing.assert_close(mixed, theirs(input_ids=ids, adapter_names=ROWS).logits, rtol=0, atol=1e-5)
    for row, name in enumerate(ROWS):
        if name == "__base__":
            with ours.disable_adapter():
                alone = ours(input_ids=ids[row : row + 1]).logits
        else:
            ours.set_adapter(name)
            alone = ours(input_ids=ids[row : row + 1]).logits
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=0, atol=1e-5)
    assert (mixed[2] - mixed[4]).abs().max() > 1e-3  # not one row five times


@pytest.mark.parametrize("beams", [1, 3])
def test_rows_generate_as_each_adapter_does_alone(beams: int, tmp_path: Path) -> None:
    ours, _ = both("llama", tmp_path)
    ids, settings = (
        token_ids(rows=3),
        {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "eos_token_id": None},
    )
    mask = torch.ones_like(ids)
    mixed = ours.generate(input_ids=ids, attention_mask=mask, adapter_names=["a", "c", "a"], **settings)
    for row, name in enumerate(["a", "c", "a"]):
        ours.set_adapter(name)
        alone = ours.generate(input_ids=ids[row : row + 1], attention_mask=mask[:1], **settings)
        assert torch.equal(mixed[row], alone[0])


def test_heads_and_rows_of_tokens_are_each_adapters_own() -> None:
    config = {"one": chosen("bert"), "two": chosen("bert", trainable_token_indices=[5, 6])}
    model = get_peft_model(make("bert"), LoraConfig(**config["one"]), "one")
    model.add_adapter("two", LoraConfig(**config["two"]))
    shake(model)
    model.eval()
    ids = token_ids(rows=2)
    ids[:, 2] = 5
    mixed = model(input_ids=ids, adapter_names=["one", "two"]).logits
    for row, name in enumerate(config):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[row : row + 1], model(input_ids=ids[row : row + 1]).logits)


def test_mixed_batches_that_cannot_be(tmp_path: Path) -> None:
    model, _ = both("llama", tmp_path)
    ids = token_ids(rows=2)
    for names, complaint in (
        (["a"], "1 names, expected one for each of 2 rows"),
        (["a", "d"], "Adapter d does not exist"),
        ([], "0 names"),
    ):
        with pytest.raises(AdapterError, match=complaint):
            model(input_ids=ids, adapter_names=names)
    with pytest.raises(AdapterError, match="training mode"):
        model.train()(input_ids=ids, adapter_names=["a", "b"])
    model.eval().merge_adapter(["a"])
    with pytest.raises(AdapterError, match="merged"):
        model(input_ids=ids, adapter_names=["a", "b"])
    model.unmerge()
    assert model.switch.rows is None
    with pytest.raises(AdapterError, match="cannot be told apart"), model.mixed_batch(["a", "b"]):
        model(input_ids=token_ids(rows=3))


# ---- weighted sums --------------------------------------------------------------------------------------------------


def deltas(model: PeftModel, name: str) -> dict[str, torch.Tensor]:
    return {path: layer.delta(name) for path, layer in model.named_modules() if name in getattr(layer, "r", {})}


WEIGHTS = [0.7, -1.3]


@pytest.mark.parametrize("way", ["cat", "svd", "ties_svd", "magnitude_prune_svd"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_weighted_sum_is_that_of_peft(architecture: str, way: str, tmp_path: Path) -> None:
    ours, theirs = both(architecture, tmp_path)
    settings = {"svd_rank": 4, "density": 0.4} if way != "cat" else {}
    for model in (ours, theirs):
        model.add_weighted_adapter(["a", "b"], WEIGHTS, "sum", way, **settings)
        model.set_adapter("sum")
    ids = token_ids()
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("way", ["linear", "ties", "dare_ties_svd"])
def test_peft_reads_a_weighted_sum(way: str, tmp_path: Path) -> None:
    ours, _ = both("gpt2", tmp_path)
    ours.add_weighted_adapter(["a", "b", "c"], [0.5, -0.2, 1.0], "sum", way, density=None if way == "linear" else 0.5)
    ours.set_adapter("sum")
    ours.save_pretrained(tmp_path / "made", selected_adapters=["sum"])
    for library in (PeftModel, peft.PeftModel):
        again = library.from_pretrained(make("gpt2"), tmp_path / "made" / "sum")
        torch.testing.assert_close(again(token_ids()).logits, ours(token_ids()).logits, rtol=1e-4, atol=1e-4)


def test_a_sum_is_scaled_once_whatever_scaled_its_terms(tmp_path: Path) -> None:
    model, _ = both("llama", tmp_path)
    model.add_weighted_adapter(["c", "a"], [2.0, 1.0], "sum", "cat")  # the first is scaled by alpha / sqrt(r)
    one, two = deltas(model, "c"), deltas(model, "a")
    for path, update in deltas(model, "sum").items():
        torch.testing.assert_close(update, 2 * one[path] + two[path])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((["a", "c"], [1.0], "sum"), "2 adapters and 1 weights"),
        ((["a", "z"], [1.0, 1.0], "sum"), "Adapter z does not exist"),
        ((["a", "c"], [1.0, float("nan")], "sum"), "not finite"),
        ((["a", "c"], [1.0, 1.0], "sum", "tied"), "unknown combination_type 'tied'"),
        ((["a", "c"], [1.0, 1.0], "sum", "ties"), "density None"),
        ((["a", "c"], [1.0, 1.0], "sum", "svd", 0), "svd_rank is 0"),
        ((["a", "a"], [1.0, 1.0], "sum"), "named twice"),
        ((["a", "c"], [1.0, 1.0], "b"), "Adapter with name 'b' already exists"),
    ],
)
def test_sums_that_cannot_be(arguments: tuple, complaint: str, tmp_path: Path) -> None:
    model, _ = both("llama", tmp_path)
    with pytest.raises(AdapterError, match=complaint):
        model.add_weighted_adapter(*arguments)
    assert set(model.peft_config) == {"a", "b", "c"}


@pytest.mark.parametrize("name", ["", "a.b", "weight", "half", "keys", "__base__"])
def test_names_that_no_adapter_can_have(name: str) -> None:
    with pytest.raises(AdapterError, match="cannot be named"):
        get_peft_model(make("llama"), LoraConfig(**chosen("llama")), name)


def test_a_head_trained_whole_has_no_sum() -> None:
    model = get_peft_model(make("bert"), LoraConfig(**chosen("bert")), "one")
    with pytest.raises(AdapterError, match="modules_to_save"):
        model.add_weighted_adapter(["one"], [2.0], "double")
