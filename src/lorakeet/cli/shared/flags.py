"""Flags that several commands have alike, as types of their parameters."""

from __future__ import annotations

from typing import Annotated

import typer

#: Whether the result is printed as JSON.
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
#: The same, of a command that writes files.
ResultAsJson = Annotated[bool, typer.Option("--json", help="print the result as JSON")]
#: Whether what is in the folder of ``--out`` is replaced.
OverwriteOut = Annotated[bool, typer.Option("--overwrite", help="replace the contents of --out")]
#: Whether an adapter of another base is accepted.
AllowOtherBase = Annotated[bool, typer.Option(help="accept an adapter that was trained on another base")]
#: Whether adapters of several bases are accepted.
AllowOtherBases = Annotated[bool, typer.Option(help="accept adapters that were trained on different bases")]
#: Whether an adapter that changes nothing is accepted.
AllowUntrained = Annotated[bool, typer.Option(help="accept an adapter that never learned")]
