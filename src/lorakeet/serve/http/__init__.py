"""The HTTP side of the server, in OpenAI's forms: schema/ (what a body may hold), routes/, and the gate before them all.

It needs the packages of the extra ``serve``; :func:`check_libraries` says so before anything is loaded.
"""

from __future__ import annotations

from importlib.util import find_spec

from lorakeet.errors import MissingLibraryError

#: Packages of the extra ``serve``.
LIBRARIES = ("fastapi", "uvicorn", "prometheus_client", "llguidance")


def check_libraries() -> None:
    """Check that the packages of the extra ``serve`` are installed.

    Raises:
        MissingLibraryError: One is not; all that are missing are named.
    """
    if missing := [name for name in LIBRARIES if find_spec(name) is None]:
        raise MissingLibraryError(f"{', '.join(missing)} not installed", "pip install 'lorakeet[serve]'")
