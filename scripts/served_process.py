"""A process of ``lorakeet serve`` at a free port, with its keys, log and resident memory, for soak.py and fuzz_server.py."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx2 as httpx
from prometheus_client.parser import text_string_to_metric_families

#: Keys of the two kinds of callers.
USER, ADMIN = "the-key-of-a-caller", "the-key-of-an-admin"
#: Name of the base for callers.
BASE = "base"
#: Seconds that the server may take to be ready, and to end once its answers are finished.
_START, _STOP = 600, 120
#: Lines of a log that tell of an error in the server itself; its own lines are ``warning: TypeError at file.py:12``.
_FAULT = re.compile(r"Traceback|warning: \w+ at |Task exception|never awaited|Exception in")


class ServedProcess:
    """A served model, from the start of its process to its end by SIGTERM.

    Attributes:
        url: Address of the server.
        exit_code: Of the process, once it has ended.
    """

    def __init__(self, folder: Path, model: str, adapters: Path, *options: str) -> None:
        """Start the process, and wait until it is ready.

        Args:
            folder: Folder for its log and its keys.
            model: Base to serve.
            adapters: Folder of adapters.
            options: Further words of the command line.

        Raises:
            RuntimeError: The process has ended, or is not ready in time.
        """
        self.log, self.exit_code = folder / "server.log", None
        keys = {"--api-key-file": USER, "--admin-key-file": ADMIN}
        words = [sys.executable, "-m", "lorakeet", "serve", "--model", model, "--adapters", str(adapters)]
        words += ["--name", BASE, "--port", "0", *options]
        for option, key in keys.items():
            path = folder / option.strip("-")
            path.write_text(key + "\n", encoding="utf-8")
            path.chmod(0o600)
            words += [option, str(path)]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self.url = self._wait()

    def _wait(self) -> str:
        for _ in range(10 * _START):
            if found := re.search(r"ready +(http://\S+)", self.text()):
                return found[1]
            if self._process.poll() is not None:
                break
            time.sleep(0.1)
        self._process.kill()
        raise RuntimeError(f"the server is not ready:\n{self.text()[-2000:]}")

    def text(self) -> str:
        """Return the log so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def faults(self) -> list[str]:
        """Return the lines of the log that tell of an error in the server itself."""
        return [line for line in self.text().splitlines() if _FAULT.search(line)]

    def resident_mb(self) -> float:
        """Return the resident memory of the process in MB (Linux)."""
        status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii")
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]

    def figures(self) -> dict[str, float]:
        """Return the sums over adapters of the counters and gauges at ``/metrics``."""
        got = httpx.get(f"{self.url}/metrics", headers={"Authorization": f"Bearer {USER}"}, timeout=60)
        sums: dict[str, float] = {}
        for family in text_string_to_metric_families(got.text):
            for sample in family.samples if family.type in ("counter", "gauge") else ():
                sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
        return sums

    def stop(self) -> int:
        """End the process by SIGTERM, and return its exit code."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self.exit_code = self._process.wait(_STOP)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self.exit_code = self._process.wait()
        return self.exit_code

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._process.poll() is None:
            self.stop()
