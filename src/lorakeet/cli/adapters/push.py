"""``lorakeet push``"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lorakeet.cli.shared.flags import AllowUntrained


def push(
    adapter: Annotated[str, typer.Argument(help="folder of the adapter")],
    repo: Annotated[str, typer.Argument(help="hub repository, user/name; created if it is missing")],
    private: Annotated[bool, typer.Option("--private", help="make the repository private")] = False,
    message: Annotated[str | None, typer.Option(help="commit message")] = None,
    revision: Annotated[str | None, typer.Option(help="branch to upload to")] = None,
    allow_untrained: AllowUntrained = False,
) -> None:
    """Check an adapter and upload it with its model card. The token is that of `hf auth login` or of HF_TOKEN.

    \b
    examples:
      lorakeet push my-run/adapter me/quotes-lora
      lorakeet push my-run/adapter me/quotes-lora --private
    \f

    Args:
        adapter: This and every other parameter has its help text.
    """
    from lorakeet.adapter.hub import push_folder

    options: dict[str, Any] = {
        "private": private or None,
        "message": message,
        "revision": revision,
        "allow_untrained": allow_untrained,
    }
    print(push_folder(adapter, repo, **options))
