"""Adapters under Ray Serve: ``python examples/ray_serve.py --adapters my-adapters --replicas 2``.

Each replica is a whole server of `lorakeet serve`, with its own base and cache; Ray spreads the requests over them.
An adapter that is loaded or unloaded over HTTP is so in one replica alone: change the folder, and start again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorakeet.config import read_run


def builder(settings: dict[str, Any], adapters: str, key_file: str | None, hosts: list[str]) -> Callable[[], Any]:
    """Return a function that makes the app of one replica.

    Args:
        settings: Settings of the base, by dotted name.
        adapters: Folder of adapters, that all machines share.
        key_file: File of callers' keys.
        hosts: Names that callers reach the server by.
    """

    def build() -> Any:
        from lorakeet.serve.http.access.keys import Keys, read_keys
        from lorakeet.serve.http.app import make_app
        from lorakeet.serve.http.start import Served, open_service

        keys = Keys.of(read_keys(Path(key_file)) if key_file else ())
        base = read_run(None, values=settings).base
        return make_app(open_service(base, Served(folder=Path(adapters)), keys=keys), hosts=hosts)

    return build


def main() -> None:
    """Start the replicas, and wait."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--bits", type=int)
    parser.add_argument("--adapters", required=True, help="folder of adapters")
    parser.add_argument("--key-file", help="file of callers' keys, one a line")
    parser.add_argument("--host", action="append", default=[], help="name that callers reach the server by")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--cpus", type=int, default=2, help="cores of each replica")
    given = parser.parse_args()
    chosen = {"base.model": given.model, "base.bits": given.bits}
    settings = {name: value for name, value in chosen.items() if value is not None}

    from ray import serve

    app = serve.ingress(builder(settings, given.adapters, given.key_file, given.host))
    options = {"num_replicas": given.replicas, "ray_actor_options": {"num_cpus": given.cpus}}
    serve.run(serve.deployment(app(), **options).bind(), blocking=True)


if __name__ == "__main__":
    main()
