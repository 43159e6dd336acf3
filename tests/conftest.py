"""Fixtures of all tests: a cache for each test with nothing but compiled loops, no hub, a fixed seed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is first imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads do not speed up tiny tensors, and on a busy machine they make them ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell ignores Ctrl-C for what it runs in the background, and tests press it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch
from hypothesis import settings

from lorakeet.files import cache_home

REAL_HOME = cache_home()

# The default run uses the same examples each time, so it cannot fail by chance; `make test-all` draws new ones.
settings.register_profile("same", derandomize=True)
settings.register_profile("wild", print_blob=True)
settings.load_profile("same")


@pytest.fixture(scope="session")
def compiled_loops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of compiled loops that all tests and their processes share: compiling takes seconds."""
    if (outer := REAL_HOME / "native").is_symlink():  # these tests run in a process of another test
        return outer.resolve()
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "native"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, compiled_loops: Path) -> None:
    home = tmp_path_factory.mktemp("home")
    (home / "native").symlink_to(compiled_loops)
    monkeypatch.setenv("LORAKEET_HOME", str(home))
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Return the folder of the embedded base, converted once per machine into the user's real cache (about 30 s)."""
    from lorakeet.base.source import find_source, local_folder
    from lorakeet.config import DEFAULT_MODEL

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAKEET_HOME", str(REAL_HOME))
        return local_folder(find_source(DEFAULT_MODEL))


@pytest.fixture
def real_home(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use the user's real cache with the converted base, which ``load_base()`` and the command line open in seconds."""
    monkeypatch.setenv("LORAKEET_HOME", str(REAL_HOME))
    return REAL_HOME
