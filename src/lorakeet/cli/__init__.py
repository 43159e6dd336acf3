"""The command line: one command a file; each parses, calls one function and prints.

Data goes to stdout, talk to stderr. A mistake of the user's is one line and a hint, exit code 2; a traceback only with
``--debug``. Only the module of the command that is run is imported, so ``--help`` does not wait for torch.
"""

from __future__ import annotations

import importlib
import os
import sys

from lorakeet._optional_imports import hide_optional_packages
from lorakeet._version import __version__

COMMANDS = {
    "demo": "the whole job on embedded data: train, compare before and after, save, reload, merge",
    "train": "train an adapter from a run's YAML file and/or flags",
    "doctor": "what is wrong with data, each problem with its file and line",
    "eval": "loss, perplexity and the task's figures of a model or adapter on data",
    "generate": "complete prompts with a model, one adapter or several",
    "predict": "classes, tags, answers or vectors for texts",
    "merge": "merge an adapter into its base and save a plain model",
    "quantize": "write a base in 8 bits once, so that it opens in seconds",
    "push": "upload an adapter to the hub",
    "inspect": "what an adapter is, whether it learned, and who can load it",
    "plan": "which layers would be adapted, without any weights",
}

EXAMPLES = """\
examples:
  lorakeet demo
  lorakeet train --data quotes.jsonl --out my-run --steps 200
  lorakeet train run.yaml lora.r=32 data.path=quotes.jsonl
  lorakeet generate --adapter my-run/adapter --prompt "Two things are infinite:"
  lorakeet merge --adapter my-run/adapter --out my-model
"""


def usage() -> str:
    """The text of ``lorakeet --help``."""
    width = max(map(len, COMMANDS)) + 2
    rows = "\n".join(f"  {name:<{width}}{what}" for name, what in COMMANDS.items())
    return (
        "usage: lorakeet COMMAND [OPTIONS]\n\n"
        "LoRA fine-tuning of transformer models that is fast and never fails silently.\n\n"
        f"commands:\n{rows}\n\n"
        "options:\n"
        "  --help      this text; `lorakeet COMMAND --help` for one command\n"
        "  --version   the version\n"
        "  --debug     show the traceback of an error\n\n"
        f"{EXAMPLES}"
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code (0 well, 1 a fault of ours, 2 a mistake of the user's, 130 Ctrl-C)."""
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

        return _complain(f"no command {words[0]!r}", did_you_mean(words[0], COMMANDS) or "lorakeet --help lists them")
    return _run(words[0], words[1:], debug)


def _run(command: str, words: list[str], debug: bool) -> int:
    from lorakeet.cli.options import UsageError, parse_and_call
    from lorakeet.errors import LorakeetError

    try:
        module = importlib.import_module(f"lorakeet.cli.{command}")
        return parse_and_call(getattr(module, command), f"lorakeet {command}", words) or 0
    except LorakeetError as error:
        if debug:
            raise
        return _complain(error.message, error.hint, error.exit_code)
    except UsageError as error:
        return _complain(error.format_message(), f"lorakeet {command} --help")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            raise
        return _complain(
            f"{type(error).__name__}: {error}", f"this is a fault; see it whole with --debug {command} ...", 1
        )


def _complain(message: str, hint: str | None, code: int = 2) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    return code


def script() -> None:
    """Entry point of the program ``lorakeet``."""
    hide_optional_packages()
    sys.exit(main())
