"""Every verb with an adapter of every task: it works, or one sentence names the verb to use, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.tiny import shake
from helpers.tiny_tasks import rows_for, save_tiny, write_rows
from lorakeet import LoraConfig, get_peft_model
from lorakeet.base.architectures import AUTO_CLASSES
from lorakeet.cli import main
from lorakeet.tasks.task import Task

#: Task -> kind of its base, words that ask for a prediction.
TASKS: dict[str, tuple[str, list[str]]] = {
    "CAUSAL_LM": ("llama", []),
    "SEQ_2_SEQ_LM": ("t5", []),
    "SEQ_CLS": ("bert", ["--text", "the old bird"]),
    "TOKEN_CLS": ("bert", ["--text", "the old bird"]),
    "QUESTION_ANS": ("bert", ["--text", "the old bird", "--question", "found"]),
    "FEATURE_EXTRACTION": ("bert", ["--text", "the old bird"]),
    "MASKED_LM": ("bert", ["--text", "the <mask> bird"]),
}
WRITERS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
LABELS = {"SEQ_CLS": ("bird", "tool", "food"), "TOKEN_CLS": ("O", "B-bird", "B-tool", "B-food")}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a base of each kind, rows of each task, and an adapter of each task in the folder ``adapter`` of a run."""
    folder = tmp_path_factory.mktemp("verbs")
    for kind in {kind for kind, _ in TASKS.values()}:
        save_tiny(folder / kind, kind)
    for name, (kind, _) in TASKS.items():
        labels = LABELS.get(name)
        task = Task(name, "single_label" if name == "SEQ_CLS" else None, labels)  # type: ignore[arg-type]
        base = AUTO_CLASSES[name].from_pretrained(folder / kind, **task.model_options())
        heads = [head for head in ("classifier", "qa_outputs") if hasattr(base, head)]
        model = get_peft_model(base, LoraConfig(r=2, task_type=task.peft_type, modules_to_save=heads or None))
        shake(model)
        model.save_pretrained(folder / name / "adapter", notes={"task": task.notes()})
        write_rows(folder / f"{name}.jsonl", rows_for(name, 6))
    return folder


@pytest.mark.parametrize("name", TASKS)
def test_a_verb_knows_what_an_adapter_is_for(
    name: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    kind, asked = TASKS[name]
    opened = ["--model", kind, "--dtype", "fp32", "--adapter", name]  # the folder of a run means its adapter
    calls = {
        "generate": [*opened, "--prompt", "the old bird", "--max-new-tokens", "2"],
        "predict": [*opened, *(asked or ["--text", "the old bird"])],
        "eval": [*opened, "--data", f"{name}.jsonl"],
        "merge": ["--model", kind, "--dtype", "fp32", "--adapter", name, "--out", str(tmp_path / "merged")],
        "inspect": [name],
    }
    for verb, words in calls.items():
        right = (verb == "generate") == (name in WRITERS) if verb in ("generate", "predict") else True
        status = main([verb, *words])
        said = capsys.readouterr()
        assert status == (0 if right else 2), (verb, said.err)
        if right:
            assert said.out.strip()
            assert "classifier" not in said.err and "qa_outputs" not in said.err  # the adapter brings its head
        else:
            other = "predict" if verb == "generate" else "generate"
            assert f"error: this is a {name} model; `{verb}` needs" in said.err
            assert f"hint: use `lorakeet {other}`" in said.err and "parameters" not in said.err  # nothing was loaded
