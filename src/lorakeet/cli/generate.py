"""``lorakeet generate``"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lorakeet.cli.options import BASE_FLAGS, base_settings, with_settings
from lorakeet.errors import DataError


@with_settings(BASE_FLAGS)
def generate(
    settings: dict[str, Any],
    prompt: Annotated[list[str] | None, typer.Option(help="text to complete; may be given several times")] = None,
    prompts: Annotated[Path | None, typer.Option(help="file with one prompt a line (.jsonl: key 'prompt')")] = None,
    adapter: Annotated[list[str] | None, typer.Option(help="adapter; several times to compare")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="prompts are a user's turns; without any: talk")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="at most so many tokens")] = 60,
    greedy: Annotated[bool, typer.Option("--greedy", help="always the likeliest token")] = False,
    temperature: Annotated[float, typer.Option(help="of sampling; below 1 is more sober")] = 0.8,
    top_p: Annotated[float, typer.Option(help="sample from the likeliest tokens of this total probability")] = 0.95,
    seed: Annotated[int | None, typer.Option(help="makes sampling repeatable")] = None,
    allow_other_base: Annotated[bool, typer.Option(help="accept an adapter of another base")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object a line: adapter, prompt, text")] = False,
) -> None:
    """Complete prompts. One prompt streams token by token; with several adapters each answers in turn.

    \b
    examples:
      lorakeet generate --prompt "Two things are infinite:"
      lorakeet generate --adapter my-run/adapter --prompt "Beware of" --greedy --max-new-tokens 40
      lorakeet generate --adapter a/adapter --adapter b/adapter --prompts openings.txt --json
      lorakeet generate --chat
    """
    wanted = [*(prompt or []), *(_read_prompts(prompts) if prompts else [])]
    if not wanted and not (chat and sys.stdin.isatty()):
        raise DataError("no prompt", 'give --prompt "..." or --prompts FILE, or --chat at a terminal')
    base, adapters = base_settings(settings), list(dict.fromkeys(adapter or []))
    from lorakeet import api

    opened = api.open_model(base, adapters, allow_other_base=allow_other_base)
    how = {
        "max_new_tokens": max_new_tokens,
        "greedy": greedy,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }
    if not wanted:
        _talk(opened, adapters[0] if adapters else None, how)
    elif as_json:
        for answer in api.compare(opened, adapters, wanted, chat=chat, **how):
            print(json.dumps(answer, ensure_ascii=False), flush=True)
    else:
        _print_answers(opened, adapters, wanted, chat, how)


def _print_answers(opened: Any, adapters: list[str], wanted: list[str], chat: bool, how: dict[str, Any]) -> None:
    """Text on stdout; which adapter speaks, on stderr."""
    from lorakeet import api

    for one in adapters or [None]:  # type: ignore[list-item]
        if len(adapters) > 1:
            print(f"--- {one}", file=sys.stderr)
        if len(wanted) == 1:
            _stream(opened, one, wanted[0], chat, how)
            continue
        for prompt, text in zip(wanted, api.generate(opened, one, wanted, chat=chat, **how), strict=True):
            print(text if chat else prompt + text)


def _stream(opened: Any, adapter: str | None, prompt: str, chat: bool, how: dict[str, Any]) -> None:
    """Write the completion as it comes, behind the prompt (which waits until there is something to add to it)."""
    from lorakeet import api

    before = iter([] if chat else [prompt])
    api.generate(opened, adapter, [prompt], chat=chat, stream=lambda piece: _show(next(before, "") + piece), **how)
    print(next(before, ""))


def _talk(opened: Any, adapter: str | None, how: dict[str, Any]) -> None:
    """A conversation at the terminal, until an empty line or Ctrl-D; the model sees all of it each time."""
    from lorakeet.chat_template import render_chat
    from lorakeet.inference.generate import complete

    turns: list[dict[str, str]] = []
    print("an empty line ends the conversation", file=sys.stderr)
    with opened.answering(adapter):
        while True:
            try:
                said = input("> ").strip()
            except EOFError:
                return
            if not said:
                return
            turns.append({"role": "user", "content": said})
            prompt = render_chat(opened.base.tokenizer, turns, True)
            answer = complete(opened.model, opened.base.tokenizer, [prompt], stream=_show, **how)[0]
            print()
            turns.append({"role": "assistant", "content": answer})


def _show(piece: str) -> None:
    print(piece, end="", flush=True)


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read prompts from {path}: {error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            found.append(line)
            continue
        try:
            found.append(json.loads(line)["prompt"])
        except (json.JSONDecodeError, KeyError, TypeError):
            raise DataError(f"{path} line {number}: expected a JSON object with the key 'prompt'") from None
    if not found:
        raise DataError(f"{path} holds no prompt")
    return found
