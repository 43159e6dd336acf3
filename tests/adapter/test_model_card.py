"""The model card: what the hub reads of it, whose it is, and that ``peft`` lives with it."""

from __future__ import annotations

import re
from pathlib import Path

import peft
import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from helpers.tiny import make, shake, token_ids
from lorakeet import LoraConfig, get_peft_model
from lorakeet.adapter.model_card import MARKER, PLACE, card, public_name, write_card
from lorakeet.errors import OutputError

pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file")
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


def config(**settings: object) -> LoraConfig:
    values = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "base_model_name_or_path": BASE}
    return LoraConfig(**{**values, **settings})


def table(text: str) -> dict[str, str]:
    """The rows of all tables, as a Markdown reader sees them."""
    rows = [re.split(r"(?<!\\)\|", line.strip("|")) for line in text.splitlines() if line.startswith("| ")]
    return {key.strip(): value.strip().replace("\\|", "|") for key, value in rows if key.strip()}


def test_the_metadata_that_the_hub_reads(tmp_path: Path) -> None:
    write_card(tmp_path, config(), {})
    read = ModelCard.load(tmp_path / "README.md")
    assert read.data.to_dict() == {
        "base_model": BASE,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": [f"base_model:adapter:{BASE}", "lora", "lorakeet", "transformers"],
    }
    assert yaml.safe_load((tmp_path / "README.md").read_text().split("---\n")[1]) == read.data.to_dict()


@pytest.mark.parametrize(
    ("task", "pipeline", "loader"),
    [
        ("CAUSAL_LM", "text-generation", "AutoModelForCausalLM"),
        ("SEQ_2_SEQ_LM", "text-generation", "AutoModelForSeq2SeqLM"),
        ("SEQ_CLS", "text-classification", "AutoModelForSequenceClassification"),
        ("TOKEN_CLS", "token-classification", "AutoModelForTokenClassification"),
        ("QUESTION_ANS", "question-answering", "AutoModelForQuestionAnswering"),
        ("FEATURE_EXTRACTION", "feature-extraction", "AutoModel"),
        (None, None, "AutoModel"),
    ],
)
def test_each_task(task: str | None, pipeline: str | None, loader: str) -> None:
    read = ModelCard(card(config(task_type=task), {}))
    assert read.data.pipeline_tag == pipeline
    assert f'base = {loader}.from_pretrained("{BASE}")\nmodel = PeftModel.from_pretrained(base, "{PLACE}")' in read.text
    assert ("num_labels=" in read.text) == (task in ("SEQ_CLS", "TOKEN_CLS"))


@pytest.mark.parametrize("name", ["/home/ana/base", "../base", "~/base", "a/b/c", "C:\\base", "base.gguf", "", None])
def test_a_path_never_is_the_bases_name(name: str | None) -> None:
    text = card(config(base_model_name_or_path=name), {})
    data = ModelCard(text).data.to_dict()
    assert "base_model" not in data and not [tag for tag in data["tags"] if tag.startswith("base_model")]
    assert not name or name not in text


def test_a_folder_that_is_here_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert public_name("models/base") == "models/base" and public_name("gpt2") == "gpt2"
    (tmp_path / "models" / "base").mkdir(parents=True)
    assert public_name("models/base") is None


def test_settings_and_figures() -> None:
    regex = r".*\.(q|v)_proj"
    notes = {"steps": 200, "tokens": 1234567, "eval_loss_before": 4.21181, "eval_loss_after": 3.5, "wall_seconds": 9.0}
    text = card(config(r=16, lora_alpha=32, target_modules=regex, rank_pattern={"a.b": 3}, use_rslora=True), notes)
    assert table(text) == {
        "r": "16",
        "lora_alpha": "32",
        "use_rslora": "yes",
        "lora_dropout": "0",
        "target_modules": f"`{regex}`",
        "rank_pattern": "`a.b: 3`",
        "bias": "`none`",
        "optimizer steps": "200",
        "tokens in the loss": "1,234,567",
        "held-out loss before": "4.2118",
        "held-out loss after": "3.5",
    }
    assert "## Training" not in card(config(), {"base": {}, "lorakeet": "0.1"})


def test_ours_is_written_again_and_theirs_is_kept(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    write_card(tmp_path, config(r=4), {})
    write_card(tmp_path, config(r=5), {})
    assert table(readme.read_text())["r"] == "5"
    mine = readme.read_text().replace(MARKER, "") + "What I found out.\n"
    readme.write_text(mine)
    write_card(tmp_path, config(r=6), {})
    assert readme.read_text() == mine
    readme.write_bytes(b"\xff\xfe not UTF-8")
    write_card(tmp_path, config(r=6), {})
    assert readme.read_bytes() == b"\xff\xfe not UTF-8"
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_nowhere_to_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        write_card(tmp_path / "file", config(), {})


def test_saved_with_the_adapter_and_no_trouble_to_peft(tmp_path: Path) -> None:
    model = get_peft_model(make("llama"), config()).eval()
    shake(model)
    model.save_pretrained(tmp_path, notes={"steps": 3})
    assert table((tmp_path / "README.md").read_text())["optimizer steps"] == "3"
    theirs = peft.PeftModel.from_pretrained(make("llama"), tmp_path)
    assert torch.allclose(theirs(token_ids()).logits, model(token_ids()).logits, atol=1e-5)
    theirs.save_pretrained(tmp_path)  # PEFT opens the card that is there and adds to it
    assert ModelCard.load(tmp_path / "README.md").data.library_name == "peft"
