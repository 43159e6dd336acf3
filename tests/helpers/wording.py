"""Check the wording of docstrings, comments, messages and pages; CONTRIBUTING.md states the rule.

Run it on files or folders: ``python tests/helpers/wording.py src/lorakeet/lora docs/training.md``.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

#: Verbs that may open the docstring of a function, one a line.
VERBS = frozenset(Path(__file__).with_name("verbs.txt").read_text(encoding="utf-8").split())
#: Words that open no docstring, constant's comment or class docstring.
BANNED_OPENINGS = re.compile(
    r"(What|Who|Whose|Whom|Which|How|Why|Where|When|Of|Among|So|Such|As|That|Those|There|If|It|Its|One|With|Without|All"
    r"|Any)\b"
)
#: House phrases that must be decoded; each has a plain word in docs/glossary.md.
BANNED_PHRASES = re.compile(
    r"\b(so many|so few|such a|nobody|whoever|the one\b[^.]{0,60}\bthe other|as a rule|at hand|"
    r"(?:is|are|was|were) (?:said|told)|lies? beside|slow truths?|no one|whatever stands|"
    r"what is (?:there|left|wrong|said|learned|read|kept|given|asked)|complain(?:s|ed)? of|on its way|of one's own|shall)\b",
    re.IGNORECASE,
)
#: Words. The longest sentence of a docstring or comment, and of a page.
LONGEST, LONGEST_ON_A_PAGE = 25, 30
#: Parameters. A public function with this many or more describes them under ``Args:``.
DESCRIBED_PARAMETERS = 4
_SECTIONS = re.compile(
    r"^\s*(Args|Returns|Raises|Yields|Attributes|Example|Examples|Note|Notes|Reference|References):", re.M
)
_FENCES = re.compile(r"```.*?```|~~~.*?~~~", re.S)
_CODE = re.compile(r"``[^`]*``|`[^`]*`")


def sentences(text: str) -> Iterator[str]:
    """Yield the sentences of prose: paragraphs, list items and entries of ``Args:``; tables and code are left out."""
    blocks: list[list[str]] = [[]]
    in_code = False
    for line in text.splitlines():
        bare = line.strip()
        if bare.startswith((">>>", "|", "+--", "..", "#", "!", "[!")) or (bare and not re.search(r"[A-Za-z]{2}", bare)):
            blocks.append([])
            continue
        if in_code and (not bare or line.startswith(("    ", "\t"))):
            continue
        in_code = False
        if not bare or re.match(r"([-*•]|\d+[.)])\s", bare) or re.match(r"\**[\w`*, ]{1,60}\**(\([^)]*\))?: ", bare):
            blocks.append([])
        blocks[-1].append(re.sub(r"^([-*•]|\d+[.)])\s+", "", bare))
        if bare.endswith("::"):
            in_code = True
            blocks.append([])
    for block in blocks:
        prose = _CODE.sub("CODE", " ".join(block))
        prose = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", prose)  # the text of a link
        prose = re.sub(r":\w+:(?=CODE)", "", prose)
        prose = re.sub(r"\b(e\.g|i\.e|cf|vs|et al|approx|resp|Eq|eq|Fig|No|arXiv|Sec|sec)\.", r"\1", prose)
        yield from (part.strip() for part in re.split(r"(?<=[.!?:])[)\"']*\s+", prose) if part.strip())


def words(sentence: str) -> int:
    """Return the number of words; formulas and numbers count as one each."""
    return len([word for word in sentence.split() if re.search(r"[A-Za-z]", word)])


def prose_offences(text: str, longest: int) -> Iterator[str]:
    """Yield the offences of the sentences of a text."""
    for sentence in sentences(text):
        if words(sentence) > longest:
            yield f"{words(sentence)} words, at most {longest}: {sentence[:90]}…"
        if found := BANNED_PHRASES.search(sentence):
            yield f"{found.group(0)!r} is not plain: {sentence[:90]}"


def _is_property(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    names = {ast.unparse(decorator) for decorator in node.decorator_list}
    return any(name.endswith(("property", "setter", "fixture", "fixture()")) or "fixture" in name for name in names)


def _returns_bool(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return node.returns is not None and "bool" in ast.unparse(node.returns)


def docstring_offences(node: ast.AST, text: str, public: bool) -> Iterator[str]:
    """Yield the offences of the docstring of a module, class or function."""
    first = text.strip().split("\n\n")[0].strip()
    opening = first.split()[0].strip("`*:,.") if first.split() else ""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not _is_property(node):
        if opening == "Whether":
            if not _returns_bool(node):
                yield f"'Whether' opens only what returns a bool: {first[:80]}"
        elif opening not in VERBS:
            yield f"a function's docstring opens with an imperative verb, not {opening!r}: {first[:80]}"
        parameters = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        parameters = [name for name in parameters if name not in ("self", "cls")]
        if public and len(parameters) >= DESCRIBED_PARAMETERS and "Args:" not in text:
            yield f"{len(parameters)} parameters and no Args: {first[:80]}"
    elif BANNED_OPENINGS.match(first):
        yield f"a docstring opens with a verb or the field's noun, not {opening!r}: {first[:80]}"
    yield from prose_offences(text, LONGEST)


def python_offences(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and the message of every offence in a Python file."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    docstrings = set()
    is_test = "tests" in path.parts
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if not (node.body and isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)):
            continue
        text = node.body[0].value.value
        if not isinstance(text, str):
            continue
        docstrings.add(id(node.body[0].value))
        line = getattr(node, "lineno", 1)
        public = not getattr(node, "name", "").startswith("_") and not is_test
        if is_test:
            yield from ((line, one) for one in prose_offences(text, LONGEST))
        else:
            yield from ((line, one) for one in docstring_offences(node, text, public))
    for node in ast.walk(tree):  # messages and help texts
        if (
            (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and id(node) not in docstrings
                and not is_test
            )
            and len(node.value.split()) >= 3
            and (found := BANNED_PHRASES.search(node.value))
        ):
            yield node.lineno, f"{found.group(0)!r} is not plain: {node.value[:90]!r}"
    yield from comment_offences(source)


def comment_offences(source: str) -> Iterator[tuple[int, str]]:
    """Yield offences of ``#`` comments; lines that follow each other are one text."""
    text, start, last = "", 0, -2
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or re.match(r"#\s*(noqa|type:|fmt:|!|mypy:|ruff:)", token.string):
            continue
        line, bare = token.start[0], token.string.lstrip("#:").strip()
        own_line = not token.line[: token.start[1]].strip()
        if token.string.startswith("#:") and (line != last + 1) and BANNED_OPENINGS.match(bare):
            yield line, f"a constant's comment gives unit, meaning, origin; it does not open so: {bare[:80]}"
        if own_line and line == last + 1:
            text, last = f"{text} {bare}", line
            continue
        yield from ((start, one) for one in prose_offences(text, LONGEST))
        text, start, last = bare, line, line if own_line else -2
    yield from ((start, one) for one in prose_offences(text, LONGEST))


def c_offences(path: Path) -> Iterator[tuple[int, str]]:
    """Yield offences of the comments of a C file."""
    source = path.read_text(encoding="utf-8")
    for found in re.finditer(r"/\*(.*?)\*/|((?:^[ \t]*//[^\n]*\n)+)|//([^\n]*)", source, re.S | re.M):
        text = next(group for group in found.groups() if group is not None)
        text = re.sub(r"^[ \t]*(//|\*)[ \t]?", "", text, flags=re.M)
        line = source.count("\n", 0, found.start()) + 1
        yield from ((line, one) for one in prose_offences(text, LONGEST))


def page_offences(path: Path) -> Iterator[tuple[int, str]]:
    """Yield offences of a page of the documentation."""
    text = _FENCES.sub("", path.read_text(encoding="utf-8"))
    yield from ((0, one) for one in prose_offences(text, LONGEST_ON_A_PAGE))


def offences(path: Path) -> list[str]:
    """Return every offence of a file, as ``path:line: complaint``."""
    check = {".py": python_offences, ".c": c_offences, ".h": c_offences, ".md": page_offences}[path.suffix]
    return [f"{path}:{line}: {complaint}" for line, complaint in check(path)]


def main(places: list[str]) -> int:
    """Print the offences of the files below ``places``; return 1 if there are any."""
    found = []
    for place in map(Path, places):
        files = sorted(place.rglob("*")) if place.is_dir() else [place]
        for file in files:
            if file.suffix in (".py", ".c", ".h", ".md"):
                found += offences(file)
    print("\n".join(found))
    print(f"{len(found)} offences")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
