"""The command line: one file a command; each parses its words, calls one function and prints the result.

Data goes to stdout, messages to stderr. A user error is one line and a hint, exit code 2; ``--debug`` adds the traceback.
Only the module of the command that runs is imported, so ``--help`` does not import torch.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Callable
from types import TracebackType

from lorakeet._optional_imports import hide_distributed, hide_optional_packages
from lorakeet._version import __version__
from lorakeet.kernels.cpu.threads import limit_waiting

#: Command -> one line of help; each is a function in a module of the same name.
COMMANDS = {
    "demo": "run every step on embedded data: train, compare, save, reload, merge",
    "train": "train an adapter, from a YAML file, flags or both",
    "doctor": "report the problems in data, each with its file and line",
    "eval": "measure loss, perplexity and task metrics of a model or adapter",
    "generate": "complete prompts with a model, or with one or more adapters",
    "predict": "predict classes, tags, answers, vectors or masked tokens",
    "serve": "serve a base with many adapters over HTTP, in the forms of OpenAI's API",
    "merge": "merge an adapter into its base and save a plain model",
    "export": "write an adapter for PEFT, vLLM, llama.cpp or mlx-lm, or a merged model in GGUF",
    "quantize": "save a base in 8 or 4 bits, so that it loads in seconds",
    "push": "upload an adapter to the hub",
    "inspect": "show what an adapter is, whether it was trained, and which tools load it",
    "extract": "make an adapter out of a model trained whole and its base",
    "rank": "show which rank each layer of an adapter needs, and write a smaller adapter",
    "compare": "compare two adapters: their updates, their losses, and what they write",
    "combine": "add, mix or subtract adapters into a new one: linear, svd, ties, dare",
    "plan": "predict memory, time and disk of a run, and what makes it fit, without loading weights",
    "bench": "measure this machine: its products, training and writing in each number format",
}
#: Commands whose modules are in ``cli/adapters/``.
OF_ADAPTERS = ("push", "inspect", "extract", "rank", "compare", "combine")

#: Commands that may train, in several processes; any other is one process.
OF_SEVERAL_PROCESSES = ("demo", "train", "plan", "bench")

#: Errors of files that a person or the machine causes, not a bug.
OF_THE_SYSTEM = (errno.ENAMETOOLONG, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ELOOP)
#: Characters of a name that a message shows.
_SHOWN = 80

EXAMPLES = """\
examples:
  lorakeet demo
  lorakeet train --data quotes.jsonl --out my-run --steps 200
  lorakeet train run.yaml lora.r=32 data.path=quotes.jsonl
  lorakeet generate --adapter my-run/adapter --prompt "Two things are infinite:"
  lorakeet merge --adapter my-run/adapter --out my-model
"""


def usage() -> str:
    """Return the text of ``lorakeet --help``."""
    width = max(map(len, COMMANDS)) + 2
    rows = "\n".join(f"  {name:<{width}}{help_line}" for name, help_line in COMMANDS.items())
    return (
        "usage: lorakeet COMMAND [OPTIONS]\n\n"
        "Fine-tune transformer models with LoRA: fast, and without silent failures.\n\n"
        f"commands:\n{rows}\n\n"
        "options:\n"
        "  --help      show this text; `lorakeet COMMAND --help` shows that of a command\n"
        "  --version   show the version\n"
        "  --debug     show the traceback of an error\n\n"
        "exit codes: 0 success, 2 an error that you can fix (one line and a hint), 1 a bug, 130 Ctrl-C\n\n"
        f"{EXAMPLES}"
    )


def function_of(command: str) -> Callable[..., int | None]:
    """Import the module of a command, and return its function."""
    room = "lorakeet.cli.adapters" if command in OF_ADAPTERS else "lorakeet.cli"
    function: Callable[..., int | None] = getattr(importlib.import_module(f"{room}.{command}"), command)
    return function


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0 success, 1 a bug of Lorakeet, 2 a user error, 130 Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not words or words[0] in ("--help", "-h", "help"):
        print(usage(), end="")
        return 0
    if words[0] == "--version":
        print(f"lorakeet {__version__}")
        return 0
    if words[0] not in COMMANDS:
        from lorakeet.errors import did_you_mean

        hint = did_you_mean(words[0], COMMANDS) or "`lorakeet --help` lists the commands"
        return _print_error(f"no command {words[0]!r}", hint)
    return _run(words[0], words[1:], debug)


def _run(command: str, words: list[str], debug: bool) -> int:
    from lorakeet.cli.shared.options import UsageError, parse_and_call, usage_hint, usage_message
    from lorakeet.errors import LorakeetError

    try:
        return parse_and_call(function_of(command), f"lorakeet {command}", words) or 0
    except LorakeetError as error:
        if debug:
            raise
        return _print_error(error.message, error.hint, error.exit_code)
    except UsageError as error:
        return _print_error(usage_message(error), usage_hint(error, command))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            raise
        if isinstance(error, OSError) and error.errno in OF_THE_SYSTEM:
            name = str(error.filename or "")
            shown = name if len(name) <= _SHOWN else f"{name[:_SHOWN]}..."
            return _print_error(f"{error.strerror}: {shown!r}", "choose another place, or make this one usable")
        return _print_error(
            f"{type(error).__name__}: {error}",
            f"this is a bug; `lorakeet --debug {command} ...` shows the traceback",
            1,
        )


def _print_error(message: str, hint: str | None, code: int = 2) -> int:
    """Print an error and its hint, one line each, to stderr; return the exit code."""
    from lorakeet.security.shown import for_people

    print(f"error: {' '.join(for_people(message).split())}", file=sys.stderr)
    if hint:
        print(f"hint: {for_people(hint)}", file=sys.stderr)
    return code


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a traceback as Python does, its secrets hidden."""
    import traceback

    from lorakeet.security.shown import for_people

    print(for_people("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def script() -> None:
    """Run the program ``lorakeet``; its entry point."""
    hide_optional_packages()
    if not set(sys.argv[1:2]) & set(OF_SEVERAL_PROCESSES):
        hide_distributed()
    limit_waiting()
    sys.excepthook = _print_traceback
    sys.exit(main())
