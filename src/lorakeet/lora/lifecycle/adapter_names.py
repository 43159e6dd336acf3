"""Names of adapters: each is a key of torch's tables, a part of tensor names, and the name of a folder."""

from __future__ import annotations

import re

from torch import nn

from lorakeet.errors import AdapterError

#: Name of the base without an adapter in a mixed batch; PEFT's.
BARE = "__base__"
#: Characters that no folder may have in its name on some system, and the dot, which torch's tables refuse.
_FORBIDDEN = re.compile(r'[<>:"/\\|?*.\x00-\x1f\x7f]')
#: Names of a trainer's checkpoints, which are beside the folders of adapters.
CHECKPOINT = re.compile(r"checkpoint-\d+")
#: Bytes of the longest name; file systems take 255, and temporary files need some for their own suffix.
_LONGEST = 200


def check_adapter_name(name: object) -> None:
    """Refuse a name that torch's tables, the file format or a file system cannot hold.

    Raises:
        AdapterError: the name is empty, has a dot or a slash, is an attribute of ``nn.ModuleDict``, or the like.
    """
    reason = f"it is a {type(name).__name__}, expected text" if not isinstance(name, str) else _reason(name)
    if reason:
        raise AdapterError(f"an adapter cannot be named {name!r}: {reason}", "use letters, digits, '-' and '_'")


def _reason(name: str) -> str | None:
    """Return why the text cannot be an adapter's name; None if it can."""
    if not name or name != name.strip():
        return "it is empty, or begins or ends with a blank"
    if found := _FORBIDDEN.search(name):
        return f"it contains {found[0]!r}, which the folder of an adapter cannot"
    if len(name.encode(errors="replace")) > _LONGEST or not name.isprintable():
        return f"it is longer than {_LONGEST} bytes, or not printable"
    if CHECKPOINT.fullmatch(name):
        return "the folders of checkpoints are named so"
    # tensors are parts of modules under their adapter's name, and these have attributes: training, keys, forward
    tables = (nn.ModuleDict(), nn.ParameterDict())
    if name in ("weight", "bias", BARE) or any(hasattr(table, name) for table in tables):
        return "torch or the file format uses this name itself"
    return None
