"""Fuzz the server by its own schema: ``schemathesis`` sends requests of all kinds, and none may meet an error of the server.

Usage, with ``schemathesis`` in any environment (``pip install schemathesis``)::

    python scripts/fuzz_server.py --schemathesis PATH --minutes 10 --model MODEL --adapters FOLDER

The schema is the app's ``/openapi.json``. One half of the time goes to a caller with an admin's key, the other to one without
a key. The exit code is 1 if an answer has a status of 500 or more, or the log of the server tells of an error in it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx2 as httpx

from served_process import ADMIN, BASE, ServedProcess

#: Checks of schemathesis. The others hold the answers against the schema, which describes requests alone.
CHECKS = "not_a_server_error"
#: Tokens of the longest answer; the time is for requests, not for tokens.
TOKENS = 16


def fuzz(schemathesis: str, url: str, schema: Path, minutes: float, seed: int, *headers: str) -> int:
    """Send requests for a while; return the exit code of schemathesis.

    Args:
        schemathesis: Path of its command.
        url: Address of the server.
        schema: File of the schema.
        minutes: Minutes to go on.
        seed: Seed of the first pass; each pass has the next one.
        headers: Headers of all requests.
    """
    end, code = time.monotonic() + 60 * minutes, 0
    while time.monotonic() < end:
        words = [schemathesis, "run", str(schema), "--url", url, "--checks", CHECKS, "--seed", str(seed)]
        words += ["--max-time", str(max(1, round(end - time.monotonic()))), "--mode", "all", "--no-color"]
        words += ["--continue-on-failure", "--max-examples", "200"]
        for header in headers:
            words += ["--header", header]
        code = subprocess.run(words, check=False, cwd=schema.parent).returncode or code
        seed += 1
    return code


def save_schema(server: ServedProcess, names: list[str], path: Path) -> Path:
    """Save the schema of the server, with the names that are served: of random names, all would be 404."""
    answer = httpx.get(f"{server.url}/openapi.json", headers={"Authorization": f"Bearer {ADMIN}"}, timeout=60)
    schema = answer.raise_for_status().json()
    values: dict[str, list[Any]] = {"model": [BASE, *names], "name": names, "folder": names, "lora_name": names}
    for body in schema["components"]["schemas"].values():
        for field in values.keys() & body.get("properties", {}).keys():
            if body["title"].endswith("Body"):
                body["properties"][field] = {"enum": values[field]}
    path.write_text(json.dumps(schema), encoding="utf-8")
    return path


def main() -> int:
    """Parse the command line and fuzz; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemathesis", default="schemathesis", help="path of its command")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--model", required=True, help="base to serve; a tiny one lets more requests through")
    parser.add_argument("--adapters", type=Path, required=True, help="folder of adapters")
    parser.add_argument("--task", help="task of the base, such as FEATURE_EXTRACTION")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    words = ["--max-tokens", str(TOKENS), *(["--task", options.task] if options.task else [])]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with ServedProcess(folder, options.model, options.adapters, *words) as server:
            names, half = sorted(one.name for one in options.adapters.iterdir()), options.minutes / 2
            schema = save_schema(server, names, folder / "openapi.json")
            code = fuzz(options.schemathesis, server.url, schema, half, options.seed, f"Authorization: Bearer {ADMIN}")
            code |= fuzz(options.schemathesis, server.url, schema, half, options.seed)
            ended = server.stop()
        faults = server.faults()
    print(f"exit code of the server: {ended}; lines of its log that tell of an error: {len(faults)}")
    for line in faults:
        print(line)
    return 1 if code or faults or ended else 0


if __name__ == "__main__":
    raise SystemExit(main())
