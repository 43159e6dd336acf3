"""Pushing with the real ``huggingface_hub`` client to a local hub, and loading from it by hub id."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import traceback
from pathlib import Path

import peft
import pytest
import torch
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file, save_file

from helpers.hub_server import READ_ONLY, TOKEN, Hub, environment, serving
from helpers.tiny import make, shake, token_ids
from helpers.tiny_training import tiny_tokenizer
from lorakeet import LoraConfig, PeftConfig, PeftModel, get_peft_model
from lorakeet.adapter.hub import push_folder
from lorakeet.adapter.inspect import inspect_adapter
from lorakeet.adapter.model_card import PLACE
from lorakeet.api import open_model
from lorakeet.config import BaseSettings
from lorakeet.errors import AdapterError

TINY = "ana/tiny-base"
FILES = {"adapter_config.json", "adapter_model.safetensors", "README.md", "lorakeet.json"}
WRONG = "hf_SecretThatIsWrong"


def trained(name: str = "default", **settings: object) -> PeftModel:
    """A trained adapter on a tiny base."""
    values = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(make("llama"), LoraConfig(base_model_name_or_path=TINY, **values), name).eval()
    shake(model, name)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    trained().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def refused(folder: Path | str, repo: str = "ana/quotes", **options: object) -> str:
    """Return the error of a push that must fail: a sentence and a hint, with no token in it or in its traceback."""
    with pytest.raises(AdapterError) as caught:
        push_folder(folder, repo, **options)
    shown, error = "".join(traceback.format_exception(caught.value)), caught.value
    while error := error.__context__:  # what a traceback leaves out must not hold it either
        shown += repr(error)
    assert not [secret for secret in (TOKEN, READ_ONLY, WRONG) if secret in shown]
    assert len(caught.value.message.splitlines()) == 1 and caught.value.hint
    return str(caught.value)


def test_there_and_back_again(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    address = push_folder(folder, "ana/quotes", message="Quotations, 200 steps")
    assert address == f"{hub.url}/ana/quotes" and hub.messages == ["Quotations, 200 steps"]
    there = hub.repos["ana/quotes"]["main"]
    assert there == {name: (folder / name).read_bytes() for name in FILES}

    wanted = trained()(token_ids()).logits
    assert PeftConfig.from_pretrained("ana/quotes").r == 4
    mine = PeftModel.from_pretrained(make("llama"), "ana/quotes")
    assert torch.equal(mine(token_ids()).logits, wanted)
    assert inspect_adapter("ana/quotes")["bytes"] == inspect_adapter(folder)["bytes"]
    assert peft.PeftConfig.from_pretrained("ana/quotes").base_model_name_or_path == TINY
    theirs = peft.PeftModel.from_pretrained(make("llama"), "ana/quotes")
    assert torch.allclose(theirs(token_ids()).logits, wanted, atol=1e-5)
    assert not torch.allclose(make("llama")(token_ids()).logits, wanted, atol=1e-2)


def test_pushing_again_replaces_and_a_branch_is_its_own(hub: Hub, folder: Path, tmp_path: Path) -> None:
    push_folder(folder, "ana/quotes", token=TOKEN)
    before = dict(hub.repos["ana/quotes"]["main"])
    wider = trained(r=6)
    wider.save_pretrained(tmp_path / "wider")
    assert push_folder(tmp_path / "wider", "ana/quotes", revision="r6", token=TOKEN).endswith("/ana/quotes/tree/r6")
    assert hub.repos["ana/quotes"]["main"] == before
    loaded = PeftModel.from_pretrained(make("llama"), "ana/quotes", revision="r6")
    assert loaded.peft_config["default"].r == 6
    assert torch.equal(loaded(token_ids()).logits, wider(token_ids()).logits)
    push_folder(tmp_path / "wider", "ana/quotes", token=TOKEN)
    assert PeftConfig.from_pretrained("ana/quotes").r == 6


def test_a_model_pushes_all_its_adapters(hub: Hub) -> None:
    model = trained("french")
    model.add_adapter("dutch", LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM"))
    shake(model, "dutch")
    model.push_to_hub("ana/languages", token=TOKEN, private=True)
    assert set(hub.repos["ana/languages"]["main"]) == {
        f"{name}/{file}" for name in ("french", "dutch") for file in FILES
    }
    assert hub.private == {"ana/languages"}
    with pytest.raises(AdapterError, match="ana/languages"):
        PeftModel.from_pretrained(make("llama"), "ana/languages", subfolder="dutch")  # not logged in


def test_only_the_adapters_own_files_leave_the_machine(hub: Hub, folder: Path) -> None:
    for name in ("tokenizer.json", "chat_template.jinja", "optimizer.pt", "training_args.bin", ".env", "notes.txt"):
        (folder / name).write_text("{}")
    for name in ("checkpoint-5", "runs", ".cache"):
        (folder / name).mkdir()
        for file in FILES if name != "runs" else ["tokenizer.json"]:
            (folder / name / file).write_bytes((folder / file).read_bytes() if file in FILES else b"")
    push_folder(folder, "ana/quotes", token=TOKEN)
    assert set(hub.repos["ana/quotes"]["main"]) == FILES | {"tokenizer.json", "chat_template.jinja"}


def test_a_link_out_of_the_folder_is_not_pushed(hub: Hub, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret")
    assert "leads out of the folder" in refused(folder, token=TOKEN)
    assert not hub.requests


def test_the_cards_snippets_run(hub: Hub, folder: Path, tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "base")
    hub.put(TINY, tmp_path / "base")
    push_folder(folder, "ana/quotes", token=TOKEN)
    text = ModelCard.load("ana/quotes").text
    [snippet] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for package in ("lorakeet", "peft"):
        names: dict = {}
        exec(snippet.replace(PLACE, "ana/quotes").replace("from lorakeet", f"from {package}"), names)
        assert torch.allclose(names["model"](token_ids()).logits, trained()(token_ids()).logits, atol=1e-5)


# -- refused adapters and tokens --------------------------------------------------------------------------------------------


def test_a_wrong_token(hub: Hub, folder: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    message = refused(folder, token=WRONG)
    assert "does not accept the token" in message and "hf auth login" in message and "***" in message
    assert not hub.repos
    push_folder(folder, "ana/quotes", token=TOKEN)
    everything = caplog.text + "".join(capfd.readouterr())
    assert "ana/quotes" in everything and WRONG not in everything and TOKEN not in everything


def test_a_token_that_may_not_write(hub: Hub, folder: Path) -> None:
    assert "may not write to 'ana/quotes': this token may only read" in refused(folder, token=READ_ONLY)
    assert "may not write to 'bob/quotes'" in (message := refused(folder, "bob/quotes", token=TOKEN))
    assert "your user's or organization's name" in message


def test_no_token(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for token in (None, False, True, " "):
        assert "no token" in (message := refused(folder, token=token)) and "HF_TOKEN" in message
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "no token" in refused(folder, token=False)
    assert not hub.requests


def test_the_token_of_the_usual_login(hub: Hub, folder: Path) -> None:
    Path(constants.HF_TOKEN_PATH).write_text(TOKEN + "\n")
    push_folder(folder, "ana/quotes")
    assert "ana/quotes" in hub.repos


@pytest.mark.parametrize("token", [f"{WRONG}\nX-Other: 1", f"{WRONG} {WRONG}", f"{WRONG}é", f"{WRONG}\x00"])
def test_a_token_that_is_none(hub: Hub, folder: Path, token: str) -> None:
    assert "characters that no token has" in refused(folder, token=token)


@pytest.mark.parametrize("repo", ["ana/a/b", "../adapter", "ana/quo tes", "", "ana/quotes.git"])
def test_a_name_that_is_no_hub_id(hub: Hub, folder: Path, repo: str) -> None:
    assert "cannot be a name on the hub" in (message := refused(folder, repo, token=TOKEN)) and "user/name" in message
    assert not hub.requests


def test_a_hub_that_does_not_answer(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot reach the hub at http://127.0.0.1:9" in refused(folder, token=TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused(folder, token=TOKEN)


def test_a_hub_that_is_broken(hub: Hub, folder: Path) -> None:
    hub.broken = True
    assert "answers 503: the hub is being repaired" in refused(folder, token=TOKEN)


def test_nothing_is_sent_of_a_folder_without_a_valid_adapter(hub: Hub, folder: Path, tmp_path: Path) -> None:
    assert "is not a folder" in refused(tmp_path / "nowhere", token=TOKEN)
    (tmp_path / "empty").mkdir()
    assert "has no adapter_config.json" in refused(tmp_path / "empty", token=TOKEN)
    (tmp_path / "run.yaml").write_text("")
    assert "the folder of a run" in (message := refused(tmp_path, token=TOKEN)) and str(folder) in message

    weights = folder / "adapter_model.safetensors"
    whole, tensors = weights.read_bytes(), load_file(weights)
    weights.write_bytes(whole[:-100])
    assert "damaged" in refused(folder, token=TOKEN)
    save_file({key: value * float("nan") for key, value in tensors.items()}, weights)
    assert "NaN" in refused(folder, token=TOKEN)
    save_file({key: value * (".lora_A." in key) for key, value in tensors.items()}, weights)
    assert "changes nothing" in refused(folder, token=TOKEN)
    weights.rename(folder / "adapter_model.bin")
    assert "pickle" in refused(folder, token=TOKEN)
    assert not hub.requests


def test_a_readme_the_hub_cannot_read(hub: Hub, folder: Path) -> None:
    (folder / "README.md").write_text("---\nbase_model: [\n---\nmine\n")
    with pytest.raises(AdapterError, match=r"Invalid metadata in README\.md"):
        push_folder(folder, "ana/quotes", token=TOKEN)
    assert hub.repos["ana/quotes"]["main"] == {}


def test_a_local_path_as_the_base_is_reported(
    hub: Hub,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trained().save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "/home/ana/base"}))
    push_folder(tmp_path, "ana/quotes", token=TOKEN)
    assert "'/home/ana/base', which is not on the hub" in caplog.text


@pytest.mark.slow
def test_a_process_of_its_own_reads_the_environment(folder: Path, tmp_path: Path) -> None:
    """The user's way: HF_ENDPOINT and HF_TOKEN are set, and nothing else."""
    script = (
        "import sys, torch\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from helpers.tiny import make, token_ids\n"
        "from lorakeet import PeftModel\n"
        "from lorakeet.adapter.hub import push_folder\n"
        "print(push_folder(sys.argv[2], 'quotes'))\n"
        "loaded = PeftModel.from_pretrained(make('llama'), 'ana/quotes')\n"
        "torch.save(loaded(token_ids()).logits, sys.argv[3])\n"
    )
    tests = Path(__file__).parents[1]
    with serving() as server:
        env = {**os.environ, **environment(server, tmp_path / "home")}
        command = [sys.executable, "-c", script, str(tests), str(folder), str(tmp_path / "logits.pt")]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{server.url}/ana/quotes" and TOKEN not in done.stdout + done.stderr
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert torch.equal(logits, trained()(token_ids()).logits)


def test_a_tokenizer_pushed_with_the_adapter_is_the_one_that_generates(
    hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    plain = tiny_tokenizer()
    plain.save_pretrained(tmp_path / "base")
    make("llama").save_pretrained(tmp_path / "base")
    plain.chat_template = "{{ messages[0]['content'] }} and then"
    plain.save_pretrained(folder)
    push_folder(folder, "ana/with-tokenizer")
    opened = open_model(BaseSettings(model=str(tmp_path / "base")), ["ana/with-tokenizer"])
    assert opened.base.tokenizer.chat_template == plain.chat_template
    push_folder(without_tokenizer(folder), "ana/without")
    assert open_model(BaseSettings(model=str(tmp_path / "base")), ["ana/without"]).base.tokenizer.chat_template is None


def without_tokenizer(folder: Path) -> Path:
    for file in folder.iterdir():
        if file.name not in FILES:
            file.unlink()
    return folder
