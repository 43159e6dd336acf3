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
    prompt: Annotated[list[str] | None, typer.Option(help="text to complete; repeatable")] = None,
    prompts: Annotated[Path | None, typer.Option(help="file with one prompt per line (.jsonl: key 'prompt')")] = None,
    adapter: Annotated[list[str] | None, typer.Option(help="adapter; repeat it to compare several")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="treat prompts as user turns; without a prompt: chat at the terminal")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="maximum number of new tokens")] = 60,
    greedy: Annotated[bool, typer.Option("--greedy", help="take the most likely token instead of sampling")] = False,
    temperature: Annotated[float, typer.Option(help="sampling temperature; below 1: more predictable text")] = 0.8,
    top_p: Annotated[float, typer.Option(help="sample from the most likely tokens of this total probability")] = 0.95,
    seed: Annotated[int | None, typer.Option(help="seed of the sampling")] = None,
    allow_other_base: Annotated[bool, typer.Option(help="accept an adapter that was trained on another base")] = False,
    allow_untrained: Annotated[bool, typer.Option(help="accept an adapter that never learned")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="print one JSON object per line: adapter, prompt, text")
    ] = False,
) -> None:
    """Complete prompts with each adapter in turn. A single prompt is streamed token by token.

    \b
    examples:
      lorakeet generate --prompt "Two things are infinite:"
      lorakeet generate --adapter my-run/adapter --prompt "Beware of" --greedy --max-new-tokens 40
      lorakeet generate --adapter a/adapter --adapter b/adapter --prompts openings.txt --json
      lorakeet generate --chat
    \f

    Args:
        settings: Settings set by flags, by dotted name; every other parameter has its help text.
    """
    wanted = [*(prompt or []), *(_read_prompts(prompts) if prompts else [])]
    if not wanted and not (chat and sys.stdin.isatty()):
        raise DataError("no prompt", 'give --prompt "..." or --prompts FILE, or --chat at a terminal')
    base, adapters = base_settings(settings), list(dict.fromkeys(adapter or []))
    from lorakeet import api

    opened = api.open_model(base, adapters, allow_other_base=allow_other_base, allow_untrained=allow_untrained)
    sampling = {
        "max_new_tokens": max_new_tokens,
        "greedy": greedy,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }
    if not wanted:
        _chat(opened, adapters[0] if adapters else None, sampling)
    elif as_json:
        for answer in api.compare(opened, adapters, wanted, chat=chat, **sampling):
            print(json.dumps(answer, ensure_ascii=False), flush=True)
    else:
        _print_answers(opened, adapters, wanted, chat, sampling)


def _print_answers(opened: Any, adapters: list[str], wanted: list[str], chat: bool, sampling: dict[str, Any]) -> None:
    """Print completions to stdout, and the name of each of several adapters to stderr."""
    from lorakeet import api

    for adapter in adapters or [None]:  # type: ignore[list-item]
        if len(adapters) > 1:
            print(f"--- {adapter}", file=sys.stderr)
        if len(wanted) == 1:
            _stream(opened, adapter, wanted[0], chat, sampling)
            continue
        for prompt, text in zip(wanted, api.generate(opened, adapter, wanted, chat=chat, **sampling), strict=True):
            print(text if chat else prompt + text)


def _stream(opened: Any, adapter: str | None, prompt: str, chat: bool, sampling: dict[str, Any]) -> None:
    """Print the prompt and its completion piece by piece; the prompt appears with the first piece."""
    from lorakeet import api

    before = iter([] if chat else [prompt])
    api.generate(opened, adapter, [prompt], chat=chat, stream=lambda piece: _show(next(before, "") + piece), **sampling)
    print(next(before, ""))


def _chat(opened: Any, adapter: str | None, sampling: dict[str, Any]) -> None:
    """Hold a conversation at the terminal, until an empty line or Ctrl-D; each turn sees all earlier ones."""
    from lorakeet.chat_template import render_chat
    from lorakeet.inference.generate import complete

    turns: list[dict[str, str]] = []
    print("an empty line ends the conversation", file=sys.stderr)
    with opened.answering(adapter):
        while True:
            try:
                question = input("> ").strip()
            except EOFError:
                return
            if not question:
                return
            turns.append({"role": "user", "content": question})
            prompt = render_chat(opened.base.tokenizer, turns, True)
            answer = complete(opened.model, opened.base.tokenizer, [prompt], stream=_show, **sampling)[0]
            print()
            turns.append({"role": "assistant", "content": answer})


def _show(piece: str) -> None:
    print(piece, end="", flush=True)


def _read_prompts(path: Path) -> list[str]:
    """Read the prompts of a file."""
    from lorakeet.data.read.formats import read_inputs

    found = []
    for location, row in read_inputs(path, "prompt"):
        prompt = row.get("prompt")
        if not isinstance(prompt, str):
            raise DataError(
                f"{location.phrase} has no prompt, expected a text in 'prompt'", 'write each row as {"prompt": "..."}'
            )
        found.append(prompt)
    return found
