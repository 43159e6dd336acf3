"""The reading order of the package names each of its modules in the step of its room."""

from __future__ import annotations

import re
from pathlib import Path

import lorakeet.data

ROOMS = ("read", "rows", "encode", "doctor", "")


def test_the_reading_order_names_every_module_of_every_room() -> None:
    folder = Path(str(lorakeet.data.__file__)).parent
    steps = re.split(r"^\d\. ", str(lorakeet.data.__doc__), flags=re.MULTILINE)[1:]
    assert len(steps) == len(ROOMS)
    for room, step in zip(ROOMS, steps, strict=True):
        modules = {path.stem for path in (folder / room).glob("*.py")} - {"__init__"}
        named = set(re.findall(r"``(\w+)``", step)) - {room}
        assert named == modules, room
