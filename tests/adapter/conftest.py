"""A local hub for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers.utils.hub
from huggingface_hub import close_session, constants, hf_api

from helpers.hub_server import Hub, serving


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty hub that this process pushes to and downloads from, without a login."""
    home = tmp_path_factory.mktemp("hf")
    with serving() as server:
        _point_at(server.url, home, monkeypatch)
        yield server
    close_session()


def _point_at(url: str, home: Path, patch: pytest.MonkeyPatch) -> None:
    """Set what ``hub_server.environment`` sets, for a ``huggingface_hub`` that has read its environment already."""
    patch.setenv("NO_PROXY", "127.0.0.1")
    patch.delenv("HF_TOKEN", raising=False)
    for name, value in {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
    }.items():
        patch.setattr(constants, name, value)
    # the client that transformers made for another hub's address
    patch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
    patch.setattr(hf_api.api, "endpoint", url)  # made when huggingface_hub was imported
    close_session()
