"""Two processes (gloo, on the CPU) train as one process with the same samples per step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from helpers.processes import RUN, launch, settings
from helpers.tiny_training import PAD, tiny_data, tiny_llama
from lorakeet.data.collate import PaddingCollator
from lorakeet.runs.metrics_log import read_metrics
from lorakeet.train.evaluate import evaluate

pytestmark = pytest.mark.slow


DIVERGE = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from helpers.tiny_training import *
from transformers import TrainingArguments
from lorakeet.data.collate import PaddingCollator
from lorakeet.train.trainer import Trainer
class Wrong(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(self.model, inputs, return_outputs, num_items_in_batch)  # not the wrapped one
args = TrainingArguments(sys.argv[2], max_steps=2, use_cpu=True, report_to="none", save_strategy="no")
Wrong(tiny_peft(0.0, init_lora_weights=False), args, train_dataset=tiny_data(), data_collator=PaddingCollator(PAD)).train()
"""


SHARD = """
import sys, torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from lorakeet import LoraConfig, get_peft_model, load_base
dist.init_process_group("gloo")
torch.manual_seed(0)
config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
ids = torch.tensor([[5, 6, 7, 8, 9, 10], [3, 2, 5, 9, 9, 4]])
found = []
for sharded in (False, True):
    torch.manual_seed(0)
    model = get_peft_model(load_base(sys.argv[1], bits=8, dtype="fp32", device="cpu").model, config)
    if sharded:
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        kinds = {p.dtype for p in model.parameters() if type(p).__name__ == "DTensor" and p.to_local().dtype == torch.int8}
        assert kinds == {torch.int8}
    out = model(ids, labels=ids)
    out.loss.backward()
    grads = [p.grad.full_tensor() if sharded else p.grad for p in model.parameters() if p.grad is not None]
    found.append([out.loss.detach(), *grads])
assert len(found[0]) == len(found[1]) == 9
assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))
print("the same")
"""


EVALUATE = """
import json, sys
import torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from helpers.tiny_training import *
from lorakeet.data.collate import PaddingCollator
from lorakeet.train.evaluate import evaluate
dist.init_process_group("gloo")
model, seen = tiny_llama(initializer_range=0.3), []
figures = evaluate(model, tiny_data(19), PaddingCollator(PAD), 4, progress=lambda done, total: seen.append((done, total)))
with open(f"{sys.argv[2]}/{dist.get_rank()}.json", "w") as file:
    json.dump([figures, seen[-1]], file)
"""


def test_two_processes_share_an_evaluation(tmp_path):
    script = tmp_path / "evaluate.py"
    script.write_text(EVALUATE)
    done = launch(script, str(Path(__file__).parents[1]), str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    (first, shown), (second, shown_by_second) = (json.loads((tmp_path / f"{i}.json").read_text()) for i in (0, 1))
    assert first == second and (shown, shown_by_second) == ([19, 19], [19, 19])
    alone = evaluate(tiny_llama(initializer_range=0.3), tiny_data(19), PaddingCollator(PAD), 4)
    assert first == alone  # to the last digit


def test_a_base_in_8_bits_is_sharded_over_processes(tmp_path):
    """FSDP2 holds half of each int8 weight and of its scales in each process; loss and gradients stay the same."""
    settings(tmp_path, "unused")
    script = tmp_path / "shard.py"
    script.write_text(SHARD)
    done = launch(script, str(tmp_path / "base"))
    assert done.returncode == 0 and done.stdout.count("the same") == 2, done.stderr[-3000:]


@pytest.mark.parametrize(("bits", "again"), [(None, "auto"), (8, "auto"), (None, 2)])
def test_two_processes_train_as_one(tmp_path, bits, again, monkeypatch):
    monkeypatch.setenv("LORAKEET_INT8", "blocked")  # no activation or gradient is rounded, on any processor
    script = tmp_path / "train.py"
    script.write_text(RUN)
    for processes, accumulate in [(1, 4), (2, 2)]:
        changes = {"grad_accum": accumulate, "gradient_checkpointing": again if processes == 2 else False}
        file = settings(tmp_path, f"run{processes}", bits, **changes)
        done = launch(script, str(file), processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
    assert "find_unused_parameters" not in done.stderr  # a warning of DDP on every rank
    assert done.stderr.count("held-out loss") == 4  # steps 0, 3, 6 and the end: one process speaks
    one, two = (read_metrics(tmp_path / f"run{processes}" / "metrics.jsonl") for processes in (1, 2))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    near = 2e-5 if bits is None else 2e-4  # passes of many tokens may be multiplied in 16 bits, those of few are not
    for ours, theirs in zip(one, two, strict=True):
        for key in ("loss", "eval_loss", "grad_norm"):
            if key in ours:
                assert theirs[key] == pytest.approx(ours[key], rel=near), (ours, theirs)
        assert ours.get("tokens") == theirs.get("tokens")
    a, b = (json.loads((tmp_path / f"run{processes}" / "summary.json").read_text()) for processes in (1, 2))
    assert (a["samples"], a["tokens"]) == (b["samples"], b["tokens"]) and b["processes"] == 2
    x, y = (load_file(tmp_path / f"run{p}" / "adapter" / "adapter_model.safetensors") for p in (1, 2))
    for name, tensor in x.items():
        assert (y[name] - tensor).abs().max() < 5 * near, name


def test_two_processes_stop_and_resume(tmp_path):
    script = tmp_path / "train.py"
    killer = """
import transformers
import lorakeet.train.trainer as t
class Kill(transformers.TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 4: __import__("os")._exit(1)
init = t.Trainer.__init__
def patched(self, *a, callbacks=(), **k): init(self, *a, callbacks=[*callbacks, Kill()], **k)
t.Trainer.__init__ = patched
"""
    script.write_text(RUN)
    torn = tmp_path / "torn.py"
    torn.write_text(killer + RUN)
    changes = {"save_every": 3, "eval_every": None}
    assert launch(script, str(settings(tmp_path, "whole", **changes))).returncode == 0
    file = settings(tmp_path, "parts", **changes)
    assert launch(torn, str(file)).returncode != 0
    folder = tmp_path / "parts" / "checkpoints" / "checkpoint-3"
    assert {"process_0.json", "process_1.json"} <= {path.name for path in folder.iterdir()}
    refused = launch(script, str(file), "resume", processes=1)
    assert "processes was 2, is 1" in refused.stderr
    done = launch(script, str(file), "resume")
    assert done.returncode == 0, done.stderr[-3000:]
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "parts" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


def test_ctrl_c_under_torchrun_saves_in_every_process(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(RUN)
    file = settings(tmp_path, "long", steps=5000, eval_every=None)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.Popen(
        [*torchrun, str(script), str(file)], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    metrics, deadline = tmp_path / "long" / "metrics.jsonl", time.monotonic() + 200
    while len(read_metrics(metrics)) < 4 and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to torchrun and its children
    _, told = process.communicate(timeout=100)
    assert "a checkpoint is saved" in told, told[-3000:]
    (folder,) = (tmp_path / "long" / "checkpoints").iterdir()
    assert {"process_0.json", "process_1.json"} <= {path.name for path in folder.iterdir()}


def test_gradients_that_are_not_synchronized_are_an_error(tmp_path):
    script = tmp_path / "diverge.py"
    script.write_text(DIVERGE)
    done = launch(script, str(Path(__file__).parents[1]), str(tmp_path / "out"))
    assert done.returncode != 0 and "gradients differ between processes" in done.stderr, done.stderr[-3000:]
