"""``lorakeet inspect``"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from lorakeet.cli.shared.flags import AsJson


def inspect(
    adapter: Annotated[str, typer.Argument(help="folder or hub id of the adapter")],
    as_json: AsJson = False,
) -> None:
    """Show what an adapter is, whether it was trained, and which tools load it. Needs no base model.

    \b
    examples:
      lorakeet inspect my-run/adapter
      lorakeet inspect user/adapter --json
    """
    from lorakeet.adapter.inspect import inspect_adapter
    from lorakeet.adapter.inspection_text import inspection_text
    from lorakeet.security.shown import printable

    found = inspect_adapter(adapter)
    print(json.dumps(found, ensure_ascii=False) if as_json else printable(inspection_text(found)))
