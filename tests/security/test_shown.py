"""Secrets and signs that steer a terminal are in nothing that is shown or written."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from lorakeet.adapter.model_card import write_card
from lorakeet.cli import main
from lorakeet.config import read_run
from lorakeet.errors import AdapterError, ConfigError
from lorakeet.files import write_json
from lorakeet.log import info
from lorakeet.lora.config import LoraConfig
from lorakeet.security.shown import printable, redact

TOKEN = "hf_" + "aB3" * 11
SECRETS = [
    (f"token {TOKEN} of the hub", TOKEN),
    ("https://user:s3cr3t@host.example/path", "user:s3cr3t"),
    ("https://s3cr3t@host.example/path", "s3cr3t"),
    ("https://host.example/path?token=s3cr3t&x=1", "s3cr3t"),
    ("Authorization: Bearer abcdefghijklmnop0123", "abcdefghijklmnop0123"),
    ("ghp_" + "a1" * 18, "ghp_" + "a1" * 18),
]


@pytest.mark.parametrize(("text", "secret"), SECRETS)
def test_secrets_are_hidden(text: str, secret: str) -> None:
    assert secret not in redact(text) and "***" in redact(text)
    assert secret not in str(AdapterError(text, text)) and secret not in AdapterError(text).args[0]


@pytest.mark.parametrize(
    "text", ["user/name", "hf_hub", "a@b.example", "C:/x", "https://huggingface.co/user/name", "sk-1"]
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


def test_values_of_secret_variables_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-token-of-another-form")
    assert redact("got a-token-of-another-form") == "got ***"


@pytest.mark.parametrize(("text", "secret"), SECRETS)
def test_a_log_a_card_and_json_hide_them(
    text: str, secret: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="lorakeet"):
        info(text)
    write_json(tmp_path / "x.json", {"note": text})
    config = LoraConfig(base_model_name_or_path=text, target_modules=["q_proj"])
    config.save_pretrained(tmp_path)
    write_card(tmp_path, config, {"steps": text})
    assert json.loads((tmp_path / "x.json").read_text()) and len(list(tmp_path.iterdir())) == 3
    assert not any(secret in one for one in (caplog.text, *(path.read_text() for path in tmp_path.iterdir())))


@pytest.mark.parametrize(("text", "secret"), SECRETS[:4])
def test_settings_with_a_secret_are_refused(text: str, secret: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="without a token or password") as caught:
        read_run(None, [], {"base.model": text})
    assert secret not in str(caught.value)
    assert main(["train", "--data", text, "--out", "x"]) == 2
    assert secret not in capsys.readouterr().err


def test_a_traceback_hides_them() -> None:
    program = f"import sys, lorakeet.cli as cli; sys.argv[1:] = ['--debug', 'train', '{TOKEN}.yaml']; cli.script()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "Traceback" in done.stderr and "***" in done.stderr and TOKEN not in done.stderr + done.stdout


def test_steering_signs_become_escapes() -> None:
    assert printable("a\x1b[2Jb\u202ec\nd\t\x9b") == "a\\x1b[2Jb\\u202ec\nd\t\\x9b"
    assert "\x1b" not in str(AdapterError("layer '\x1b[31m'"))
