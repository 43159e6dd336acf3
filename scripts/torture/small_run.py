"""A small run of the real command that uses all that a checkpoint must hold, and the comparison of its results."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
#: Parts of the names of figures that differ between equal runs: of the clock, of memory, and of the run's own folder.
OF_THE_SESSION = ("second", "bytes", "path", "planned", "wall")
#: Quotations of the data, and the characters of the longest.
ROWS, LONGEST = 26, 90
#: Training with dropout, accumulation, several epochs, evaluations and checkpoints that fall at different steps.
SETTINGS = (
    *("train.epochs=3", "train.batch_size=2", "train.grad_accum=2", "train.lr=0.02", "train.warmup=3"),
    *("train.eval_every=5", "train.save_every=2", "train.log_every=1"),
    *("train.keep_checkpoints=2", "train.keep_best=true"),
    *("lora.r=4", "lora.lora_alpha=8", "lora.lora_dropout=0.2", "lora.target_modules=all-linear"),
    *("data.max_length=96", "data.eval_fraction=0.2"),
)


@dataclass(frozen=True)
class SmallRun:
    """A command that trains, with everything it reads.

    Attributes:
        workshop: Folder that holds base and data.
        bits: Bits per weight of the base: 32 or 8.
        settings: Further settings, which win.
    """

    workshop: Path
    bits: int = 32
    settings: tuple[str, ...] = ()

    def words(self, out: Path, *more: str) -> list[str]:
        """Return the words of ``lorakeet`` that train in the folder ``out``."""
        base = [f"base.model={self.workshop / 'base'}", f"base.bits={self.bits}", "base.dtype=fp32"]
        data = [f"data.path={self.workshop / 'quotes.jsonl'}"]
        return ["train", *base, *data, *SETTINGS, *self.settings, f"out={out}", *more]


def furnish(workshop: Path) -> None:
    """Write the base, a tiny random Llama with a tokenizer, and the data: short quotations of the package's fortunes."""
    if str(ROOT / "tests") not in sys.path:
        sys.path.append(str(ROOT / "tests"))
    from helpers.tiny_base import save_base
    from lorakeet.data.read.fortune import parse_fortunes
    from lorakeet.data.read.locate import embedded_fortunes

    save_base(workshop / "base")
    with embedded_fortunes().open(encoding="utf-8") as file:
        quotations = [quotation.text for quotation in parse_fortunes(file)]
    short = list(dict.fromkeys(text for text in quotations if len(text) <= LONGEST))[:ROWS]
    lines = [json.dumps({"text": text}) + "\n" for text in short]
    (workshop / "quotes.jsonl").write_text("".join(lines), encoding="utf-8")


def results(out: Path) -> dict[str, Any]:
    """Return what equal runs share: hashes of the adapter's files, and the logs without the figures of a session."""
    found: dict[str, Any] = {"files": sorted(str(path.relative_to(out)) for path in out.rglob("*"))}
    for path in sorted((out / "adapter").glob("*")):
        if path.name not in ("lorakeet.json", "README.md"):  # these hold seconds
            found[f"adapter/{path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    for name in ("metrics.jsonl", "summary.json", "adapter/lorakeet.json"):
        found[name] = None  # a removed folder has lost it
        if (out / name).exists():
            text = (out / name).read_text(encoding="utf-8")
            one_a_line = name.endswith("l")
            found[name] = _lasting([json.loads(line) for line in text.splitlines()] if one_a_line else json.loads(text))
    return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the names of the results that differ, with the first difference of each."""
    names = [name for name in dict.fromkeys([*one, *other]) if one.get(name) != other.get(name)]
    return [f"{name}: {_first_difference(one.get(name), other.get(name))}" for name in names]


def _lasting(value: Any) -> Any:
    """Return the figures without those of the session."""
    if isinstance(value, dict):
        return {key: _lasting(v) for key, v in value.items() if not any(part in key for part in OF_THE_SESSION)}
    return [_lasting(entry) for entry in value] if isinstance(value, list) else value


def _first_difference(one: Any, other: Any) -> str:
    """Return the first entries that differ, or the entries that only one side has."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
        return "; ".join(f"{key} {one.get(key)!r} != {other.get(key)!r}" for key in keys)
    lists = isinstance(one, list) and isinstance(other, list)
    if lists and (alone := [entry for entry in [*one, *other] if (entry in one) != (entry in other)]):
        return f"{len(alone)} of one side only, such as {alone[:3]!r}"
    return f"{one!r} != {other!r}"
