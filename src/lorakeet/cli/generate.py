"""``lorakeet generate``"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lorakeet.cli.shared.flags import AllowOtherBase, AllowUntrained
from lorakeet.cli.shared.options import BASE_FLAGS, base_settings, bounded, check_file, with_settings
from lorakeet.errors import ConfigError, DataError
from lorakeet.log import info
from lorakeet.setting_types import Count, Positive, Seed, Share


@with_settings(BASE_FLAGS)
def generate(
    settings: dict[str, Any],
    prompt: Annotated[list[str] | None, typer.Option(help="text to complete; repeatable")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="file with one prompt per line (.jsonl: key 'prompt', or 'messages')")
    ] = None,
    adapter: Annotated[list[str] | None, typer.Option(help="adapter; repeat it to compare several")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="treat prompts as user turns; without a prompt: chat at the terminal")
    ] = False,
    system: Annotated[
        str | None,
        typer.Option(help="system turn of a chat; default: that which the adapter was taught with; '': none"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(callback=bounded(Count), help="maximum number of new tokens")] = 60,
    greedy: Annotated[bool, typer.Option("--greedy", help="take the most likely token instead of sampling")] = False,
    temperature: Annotated[
        float, typer.Option(callback=bounded(Positive), help="sampling temperature; below 1: more predictable text")
    ] = 0.8,
    top_p: Annotated[
        float,
        typer.Option(callback=bounded(Share), help="sample from the most likely tokens of this total probability"),
    ] = 0.95,
    seed: Annotated[int | None, typer.Option(callback=bounded(Seed), help="seed of the sampling")] = None,
    allow_other_base: AllowOtherBase = False,
    allow_untrained: AllowUntrained = False,
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
      lorakeet generate --chat --system "Answer in verse."
    \f

    Args:
        settings: Settings set by flags, by dotted name; every other parameter has its help text.
    """
    wanted = [*(prompt or []), *(read_prompts(prompts) if prompts else [])]
    _check_prompts(wanted, chat, system)
    base, adapters = base_settings(settings), list(dict.fromkeys(adapter or []))
    from lorakeet import api

    accepted: dict[str, Any] = {"allow_other_base": allow_other_base, "allow_untrained": allow_untrained}
    opened = api.open_model(base, adapters, verb="generate", **accepted)
    sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "greedy": greedy, "seed": seed}
    sampling |= {"temperature": temperature, "top_p": top_p}
    if not wanted:
        _chat(opened, adapters[0] if adapters else None, system, sampling)
    elif as_json:
        for answer in api.compare(opened, adapters, wanted, chat=chat, system=system, **sampling):
            print(json.dumps(answer, ensure_ascii=False), flush=True)
    else:
        _print_answers(opened, adapters, wanted, {"chat": chat, "system": system, **sampling})


def _check_prompts(wanted: list[Any], chat: bool, system: str | None) -> None:
    """Refuse no prompt, and a system turn without a conversation."""
    if not wanted and not (chat and sys.stdin.isatty()):
        raise DataError("no prompt", 'give --prompt "..." or --prompts FILE, or --chat at a terminal')
    if system is not None and not chat and all(isinstance(one, str) for one in wanted):
        raise ConfigError(
            "--system is set, but no prompt is a conversation", "add --chat, or give prompts with messages"
        )


def _print_answers(opened: Any, adapters: list[str], wanted: list[Any], settings: dict[str, Any]) -> None:
    """Print completions to stdout, and the name of each of several adapters to stderr."""
    from lorakeet import api

    for adapter in adapters or [None]:  # type: ignore[list-item]
        if len(adapters) > 1:
            print(f"--- {adapter}", file=sys.stderr)
        if len(wanted) == 1:
            _stream(opened, adapter, wanted[0], settings)
            continue
        for prompt, text in zip(wanted, api.generate(opened, adapter, wanted, **settings), strict=True):
            print(prompt + text if _is_completed(prompt, settings) else text)


def _is_completed(prompt: Any, settings: dict[str, Any]) -> bool:
    """Whether a prompt is text that its completion continues, and is printed before it."""
    return isinstance(prompt, str) and not settings["chat"]


def _stream(opened: Any, adapter: str | None, prompt: Any, settings: dict[str, Any]) -> None:
    """Print the prompt and its completion piece by piece; the prompt appears with the first piece."""
    from lorakeet import api

    before = iter([prompt] if _is_completed(prompt, settings) else [])
    api.generate(opened, adapter, [prompt], stream=lambda piece: _show(next(before, "") + piece), **settings)
    print(next(before, ""))


def _chat(opened: Any, adapter: str | None, system: str | None, sampling: dict[str, Any]) -> None:
    """Hold a conversation at the terminal, until an empty line or Ctrl-D; each turn sees all earlier ones."""
    from lorakeet.api import system_turn
    from lorakeet.chat.template import with_system_turn
    from lorakeet.inference.generate import complete

    turns = with_system_turn([], system_turn(opened, adapter, system))
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
            answer = complete(opened.model, opened.base.tokenizer, [turns], stream=_show, **sampling)[0]
            print()
            turns.append({"role": "assistant", "content": answer})


def _show(piece: str) -> None:
    print(piece, end="", flush=True)


def read_prompts(path: Path) -> list[Any]:
    """Read the prompts of a file: a text for each row, or a conversation in ``messages``."""
    from lorakeet.data.read.formats import read_inputs

    check_file(path)
    found, answered = [], 0
    for location, row in read_inputs(path, "prompt"):
        prompt: Any = next((row[name] for name in ("prompt", "messages") if row.get(name)), None)
        is_chat = isinstance(prompt, list) and all(isinstance(turn, dict) and "role" in turn for turn in prompt)
        if not (is_chat or isinstance(prompt, str)):
            raise DataError(
                f"{location.phrase} has no prompt, expected a text in 'prompt', or a list of messages in 'messages'",
                'write each row as {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}',
            )
        if is_chat and prompt[-1]["role"] == "assistant" and len(prompt) > 1:
            prompt, answered = prompt[:-1], answered + 1
        found.append(prompt)
    if answered:
        info(f"{answered} conversations end with an answer: it is left out, and written anew")
    return found
