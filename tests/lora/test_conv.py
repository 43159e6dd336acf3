"""LoRA on convolutions: against a dense ΔW, against ``peft``, and through every verb, on models that read no text."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from helpers.tiny import shake
from lorakeet import LoraConfig, PeftModel, get_peft_model
from lorakeet.adapter.inspect import inspect_adapter
from lorakeet.errors import MergeError, TargetError
from lorakeet.lora.conv import LoraConv
from lorakeet.lora.layer import ActiveAdapters

pytestmark = pytest.mark.filterwarnings("ignore")

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
FUNCTION = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
#: (dimensions, in, out, further arguments): odd kernels, strides and paddings
SHAPES = {
    "1d": (1, 5, 7, {"kernel_size": 3, "padding": 1}),
    "1d strided": (1, 4, 6, {"kernel_size": 5, "stride": 2, "padding": 2, "bias": False}),
    "2d": (2, 3, 8, {"kernel_size": (3, 2), "padding": (1, 0)}),
    "2d of kernel 1": (2, 6, 4, {"kernel_size": 1}),
    "2d patches": (2, 3, 10, {"kernel_size": 4, "stride": 4}),
    "2d same": (2, 3, 5, {"kernel_size": 3, "padding": "same"}),
    "3d": (3, 2, 3, {"kernel_size": (1, 3, 2), "stride": (1, 2, 1)}),
}
#: where peft's update ignores what the base's convolution does
BEYOND_PEFT = {
    "dilated": (2, 3, 6, {"kernel_size": 3, "dilation": 2}),
    "dilated same": (1, 3, 6, {"kernel_size": 3, "dilation": 3, "padding": "same"}),
    "circular": (2, 3, 6, {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}),
    "reflecting": (1, 3, 6, {"kernel_size": 5, "padding": 2, "padding_mode": "reflect"}),
}


def conv(name: str) -> nn.Module:
    dimensions, inner, outer, more = (SHAPES | BEYOND_PEFT)[name]
    torch.manual_seed(0)
    return CONV[dimensions](inner, outer, **more)


def pixels(layer: nn.Module) -> torch.Tensor:
    sizes = (9, 8, 7)[: layer.weight.ndim - 2]
    return torch.randn(2, layer.in_channels, *sizes, generator=torch.Generator().manual_seed(5))


def adapted(layer: nn.Module, r: int = 3, **settings) -> LoraConv:
    wrapped = LoraConv(layer, ActiveAdapters(("default",)))
    wrapped.add_adapter("default", LoraConfig(r=r, init_lora_weights=False, **settings), r, 5)
    return wrapped.eval()


class Eye(nn.Module):
    """A classifier of small pictures: convolutions, one of them in groups, and linear layers."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.body = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, (3, 1), padding=(1, 0), groups=groups), nn.ReLU())
        self.neck = nn.Linear(8, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.neck(self.body(self.stem(x)).mean((2, 3))))


def eye(groups: int = 1) -> Eye:
    torch.manual_seed(0)
    return Eye(groups).eval()


PICTURES = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(7))
WANTED = {"target_modules": ["stem", "body.1", "neck"], "r": 4, "lora_alpha": 6}


@pytest.mark.parametrize("name", SHAPES | BEYOND_PEFT)
def test_the_update_is_a_convolution_with_delta(name):
    layer = conv(name)
    wrapped, x = adapted(layer), pixels(layer)
    delta = wrapped.delta("default")
    dense = copy.deepcopy(layer)
    with torch.no_grad():
        dense.weight += delta
    torch.testing.assert_close(wrapped(x), dense(x), rtol=0, atol=1e-5)
    a, b = (half["default"].weight.double() for half in (wrapped.lora_A, wrapped.lora_B))
    spelled = torch.einsum("or,ri...->oi...", b.flatten(1), a) * 5 / 3
    torch.testing.assert_close(delta.double(), spelled, rtol=0, atol=1e-6)
    assert (wrapped(x) - layer(x)).abs().max() > 1e-2
    assert wrapped(wrapped.probe()).numel() >= 2 * layer.out_channels


@pytest.mark.parametrize("name", SHAPES)
def test_the_same_tensors_answers_and_gradients_as_peft(name):
    mine = adapted(conv(name))
    theirs = peft.get_peft_model(
        nn.Sequential(conv(name)), peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"], init_lora_weights=False)
    )
    layer, x = theirs.base_model.model[0], pixels(conv(name))
    for own, other in ((mine.lora_A, layer.lora_A), (mine.lora_B, layer.lora_B)):
        assert own["default"].weight.shape == other["default"].weight.shape
        own["default"].load_state_dict(other["default"].state_dict())
    torch.testing.assert_close(mine(x), theirs(x), rtol=0, atol=1e-6)
    torch.testing.assert_close(mine.delta("default"), layer.get_delta_weight("default"), rtol=0, atol=1e-6)
    for answer in (mine(x), theirs(x)):
        answer.square().sum().backward()
    for own, other in ((mine.lora_A, layer.lora_A), (mine.lora_B, layer.lora_B)):
        torch.testing.assert_close(own["default"].weight.grad, other["default"].weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "more",
    [{}, {"use_rslora": True}, {"lora_bias": True}, {"bias": "all"}, {"bias": "lora_only"}, {"lora_dropout": 0.2}],
    ids=str,
)
def test_both_ways(more, tmp_path):
    theirs = peft.get_peft_model(eye(), peft.LoraConfig(**WANTED, **more))
    shake(theirs)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    wanted = theirs(PICTURES)
    loaded = PeftModel.from_pretrained(eye(), tmp_path / "theirs")
    torch.testing.assert_close(loaded(PICTURES), wanted, rtol=0, atol=1e-5)
    ours = get_peft_model(eye(), LoraConfig(**WANTED, **more))
    shake(ours)
    ours.eval().save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(eye(), tmp_path / "ours")
    torch.testing.assert_close(back(PICTURES), ours(PICTURES), rtol=0, atol=1e-5)
    saved = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    assert {k: v.shape for k, v in saved[0].items()} == {k: v.shape for k, v in saved[1].items()}


def test_every_verb_on_a_model_that_reads_no_text(tmp_path):
    model = get_peft_model(eye(), LoraConfig(**WANTED, modules_to_save=["head"]))
    before = eye()(PICTURES)
    assert torch.equal(model(PICTURES), before)  # a new adapter changes nothing
    model.train()
    F.cross_entropy(model(PICTURES), torch.tensor([0, 1, 2, 3])).backward()
    learning = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(learning) == 2 * 3 + 2 and all(grad is not None for grad in learning.values())
    shake(model)
    model.eval()
    model.add_adapter("second", LoraConfig(target_modules=["stem"], r=2))
    shake(model, "second", seed=8)
    first = model(PICTURES)
    model.set_adapter("second")
    second = model(PICTURES)
    model.set_adapter(["default", "second"])
    assert len({float(answer.sum()) for answer in (before, first, second, model(PICTURES))}) == 4
    with model.disable_adapter():
        assert torch.equal(model(PICTURES), before)
    model.set_adapter("default")
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(eye(), tmp_path)(PICTURES), first)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    model.merge_adapter()
    torch.testing.assert_close(model(PICTURES), first, rtol=0, atol=1e-5)
    model.unmerge()
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    model.delete_adapter("second")
    merged = model.merge_and_unload()
    assert type(merged) is Eye and type(merged.stem) is nn.Conv2d
    torch.testing.assert_close(merged(PICTURES), first, rtol=0, atol=1e-5)


def test_a_sequence_of_modules_is_a_model(tmp_path):
    def blank() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 7 * 7, 5))

    model = get_peft_model(blank(), LoraConfig(target_modules=["0", "3"], r=2))
    shake(model)
    wanted = model(PICTURES)
    assert (wanted - blank()(PICTURES)).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(blank(), tmp_path)(PICTURES), wanted)
    torch.testing.assert_close(model.merge_and_unload()(PICTURES), wanted, rtol=0, atol=1e-5)


def test_groups_answer_as_in_peft_and_cannot_be_merged(tmp_path):
    theirs = peft.get_peft_model(eye(groups=2), peft.LoraConfig(**WANTED))
    shake(theirs)
    theirs.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(eye(groups=2), tmp_path)
    torch.testing.assert_close(model(PICTURES), theirs(PICTURES), rtol=0, atol=1e-5)
    with pytest.raises(MergeError, match=r"body\.1 has 2 groups"):
        model.merge_adapter()
    torch.testing.assert_close(model(PICTURES), theirs(PICTURES), rtol=0, atol=1e-5)
    with pytest.raises(TargetError, match="2 groups, and rank 3 is not a multiple of 2"):
        get_peft_model(eye(groups=2), LoraConfig(target_modules=["body.1"], r=3))


def test_an_update_in_groups_mixes_channels_that_the_base_keeps_apart():
    layer = adapted(nn.Conv1d(4, 4, 1, groups=2), r=2)
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.base_layer.bias.zero_()
        x = torch.zeros(1, 4, 1)
        x[0, 3] = 1.0  # a channel of the second group
        assert layer(x)[0, :2].abs().max() > 1e-3  # reaches an output of the first, which no grouped weight can do


@pytest.mark.parametrize("groups", [1, 2])
def test_inspect_measures_convolutions(groups, tmp_path):
    model = get_peft_model(eye(groups), LoraConfig(**WANTED))
    shake(model)
    model.save_pretrained(tmp_path)
    info = inspect_adapter(tmp_path)
    assert info["problems"] == [] and [layer["r"] for layer in info["layers"]] == [4, 4, 4]
    a, b = (half.weight.double().flatten(1) for half in model.body[1].pair("default"))
    rows = torch.zeros(8, 4, dtype=torch.float64)
    for o in range(8):  # an output of group g sees the ranks of group g
        g, width = o // (8 // groups), 4 // groups
        rows[o, g * width : (g + 1) * width] = b[o]
    wanted = float((rows @ a).norm()) * 6 / 4
    assert next(layer for layer in info["layers"] if layer["name"] == "body.1")["update_norm"] == pytest.approx(wanted)


def test_a_half_precision_base_has_a_full_precision_adapter():
    model = get_peft_model(eye().to(torch.bfloat16), LoraConfig(**WANTED))
    shake(model)
    assert {p.dtype for n, p in model.named_parameters() if ".lora_" in n} == {torch.float32}
    half = model(PICTURES.bfloat16())
    assert half.dtype == torch.bfloat16
    full = get_peft_model(eye(), LoraConfig(**WANTED))
    shake(full)
    torch.testing.assert_close(half.float(), full(PICTURES), rtol=0, atol=0.1)
    merged = model.merge_and_unload(tolerance=0.1)
    torch.testing.assert_close(merged(PICTURES.bfloat16()), half, rtol=0, atol=0.1)


def test_dropout_is_on_the_input_of_the_update_alone():
    layer = adapted(conv("2d"), lora_dropout=0.5)
    x = pixels(layer.base_layer)
    quiet = layer(x)
    assert torch.equal(layer(x), quiet)
    layer.train()
    torch.manual_seed(0)
    mean = torch.stack([layer(x) for _ in range(400)]).mean(0)
    assert not torch.equal(layer(x), quiet)
    assert (mean - quiet).abs().mean() < 0.1 * (quiet - layer.base_layer(x)).abs().mean()  # right in expectation


def test_gaussian_and_kaiming_starts():
    torch.manual_seed(0)
    for how, spread in (("gaussian", 1 / 64), (True, (8 * 5 * 5) ** -0.5 / 3**0.5)):
        model = get_peft_model(
            nn.Sequential(nn.Conv2d(8, 16, 5)), LoraConfig(r=64, target_modules=["0"], init_lora_weights=how)
        )
        a, b = model[0].pair("default")
        assert abs(a.weight.std() / spread - 1) < 0.05 and not b.weight.any()
