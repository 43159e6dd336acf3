"""Packages that transformers imports because they are there, though the program needs them late or never: scikit-learn with
scipy, ``peft`` and ``bitsandbytes``. Without them the program starts a third sooner and its trainings take 140 MB less.
"""

from __future__ import annotations

import sys

NEVER = ("peft", "bitsandbytes")
LATE = ("sklearn", "scipy")


def hide_optional_packages() -> None:
    """From here on this process does not find them; for a program of its own, before transformers is imported."""
    for name in (*NEVER, *LATE):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def allow_sklearn() -> None:
    """Scikit-learn and scipy are found again: before they are imported."""
    for name in LATE:
        if name in sys.modules and sys.modules[name] is None:
            del sys.modules[name]
