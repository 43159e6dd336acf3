"""Rows and held-out losses for ``benchmarks/training.py``.

    python benchmarks/training_rows.py rows full FOLDER --fraction 0.01 --tokens 1024
    python benchmarks/training_rows.py losses BASE held_out.jsonl ADAPTER... --tokens 1024

``rows`` writes train.jsonl and held_out.jsonl: single quotations, or quotations joined until they fill a sample. ``losses``
uses plain ``transformers`` and ``peft`` in fp32: the mean over all target tokens, for each adapter. Both print JSON.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def encode(texts: list[str], tokenizer: Any, most: int) -> list[list[int]]:
    """Encode each text with the end token after it, cut to ``most`` tokens."""
    return [[*ids, tokenizer.eos_token_id][:most] for ids in tokenizer(texts)["input_ids"]]


def joined(texts: Iterable[str], tokenizer: Any, tokens: int) -> Iterator[str]:
    """Yield texts joined until they exceed ``tokens``; an incomplete rest is dropped."""
    parts: list[str] = []
    length = 0
    for text in texts:
        parts.append(text)
        length += len(tokenizer(text)["input_ids"])  # without the empty lines between texts
        if length > tokens:
            yield "\n\n".join(parts)
            parts, length = [], 0


def write_rows(kind: str, folder: Path, fraction: float, tokens: int) -> dict[str, Any]:
    """Write both files, and return their figures, the base's folder and torch's settings.

    Args:
        kind: ``quotations``, or ``full`` for joined ones.
        folder: Output folder.
        fraction: Share of the texts to hold out.
        tokens: Tokens of a full sample.
    """
    import torch

    from lorakeet.base.load import inspect_model
    from lorakeet.base.source import find_source, local_folder
    from lorakeet.config import BaseSettings, DataSettings, TaskSettings
    from lorakeet.data.prepare import prepare

    base = BaseSettings()
    tokenizer = inspect_model(base).tokenizer
    settings = DataSettings(path="fortunes", eval_fraction=fraction)
    data = prepare(settings, TaskSettings(type="CAUSAL_LM"), tokenizer, seed=42)
    counts = {}
    for name, part in (("train", data.train_rows), ("held_out", data.held_out_rows)):
        texts = list(part["text"])
        if kind == "full":
            random.Random(42).shuffle(texts)
            texts = list(joined(texts, tokenizer, tokens))
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        lengths = sorted(map(len, encode(texts, tokenizer, tokens)))
        counts[name] = {
            "rows": len(texts),
            "tokens": sum(lengths),
            "shortest": lengths[0],
            "median": lengths[len(lengths) // 2],
            "longest": lengths[-1],
        }
    return {
        **counts,
        "base": str(local_folder(find_source(base.model))),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def held_out_losses(base: str, file: Path, adapters: list[str], tokens: int) -> dict[str, float]:
    """Measure nats per target token with each adapter on the base in fp32.

    Args:
        base: Folder of the base.
        file: Held-out rows.
        adapters: Folders of the adapters.
        tokens: Tokens of the longest sample.
    """
    import peft
    import torch
    import transformers
    from torch.nn.utils.rnn import pad_sequence

    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    texts = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
    samples = [torch.tensor(ids) for ids in sorted(encode(texts, tokenizer, tokens), key=len)]
    batches = [
        pad_sequence(samples[at : at + 8], batch_first=True, padding_value=-1) for at in range(0, len(samples), 8)
    ]
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(plain, adapters[0], adapter_name="adapter0").eval()
    found = {}
    for number, adapter in enumerate(adapters):
        if number:
            model.load_adapter(adapter, f"adapter{number}")
        model.set_adapter(f"adapter{number}")
        total, targets = 0.0, 0
        with torch.inference_mode():
            for ids in batches:
                mask = ids >= 0
                loss = model(ids.clamp(min=0), attention_mask=mask.long(), labels=ids.masked_fill(~mask, -100)).loss
                count = int(mask[:, 1:].sum())  # the first token is not a target
                total, targets = total + float(loss) * count, targets + count
        found[adapter] = total / targets
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    rows = verbs.add_parser("rows")
    rows.add_argument("kind", choices=("quotations", "full"))
    rows.add_argument("folder", type=Path)
    rows.add_argument("--fraction", type=float, required=True, help="share of the quotations that is held out")
    losses = verbs.add_parser("losses")
    losses.add_argument("base")
    losses.add_argument("rows", type=Path)
    losses.add_argument("adapters", nargs="+")
    for verb in (rows, losses):
        verb.add_argument("--tokens", type=int, required=True, help="of the longest sample")
    options = parser.parse_args()
    if options.verb == "rows":
        found = write_rows(options.kind, options.folder, options.fraction, options.tokens)
    else:
        found = held_out_losses(options.base, options.rows, options.adapters, options.tokens)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
