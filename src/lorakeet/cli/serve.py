"""``lorakeet serve``"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakeet._optional_imports import import_late
from lorakeet.cli.shared.options import BASE_FLAGS, bounded, with_settings
from lorakeet.config import read_run
from lorakeet.errors import ConfigError
from lorakeet.security.paths import is_dir, is_plain_name
from lorakeet.setting_types import Count, Positive

if TYPE_CHECKING:
    from lorakeet.serve.http.access.keys import Keys
    from lorakeet.serve.http.service import Service

#: Largest number of a port.
_LAST_PORT = 65535


@with_settings({**BASE_FLAGS, "--task": "task.type"})
def serve(
    settings: dict[str, Any],
    adapters: Annotated[
        Path | None, typer.Option(help="folder of adapters; each is served by its folder's name")
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FOLDER", help="one more adapter under a name; repeatable")
    ] = None,
    name: Annotated[str | None, typer.Option(help="name of the base for callers; default: its id or folder")] = None,
    host: Annotated[str, typer.Option(help="address to listen at; another than this machine's own needs a key")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=_LAST_PORT, help="port to listen at; 0: any free one")] = 8000,
    api_key_file: Annotated[Path | None, typer.Option(help="file of callers' keys, one a line")] = None,
    admin_key_file: Annotated[
        Path | None, typer.Option(help="file of keys that may also load and unload adapters")
    ] = None,
    allow_hub: Annotated[bool, typer.Option("--allow-hub", help="let admins load adapters from the hub")] = False,
    allow_host: Annotated[list[str] | None, typer.Option(help="name that callers reach the server by")] = None,
    allow_origin: Annotated[list[str] | None, typer.Option(help="web page whose scripts may call")] = None,
    max_rows: Annotated[int, typer.Option(callback=bounded(Count), help="requests that run together")] = 16,
    queue: Annotated[int, typer.Option(callback=bounded(Count), help="requests that may wait; then 429")] = 64,
    cache_mb: Annotated[int, typer.Option(callback=bounded(Count), help="megabytes for keys and values")] = 1024,
    max_tokens: Annotated[int, typer.Option(callback=bounded(Count), help="tokens of the longest answer")] = 4096,
    timeout: Annotated[float, typer.Option(callback=bounded(Positive), help="seconds of the longest request")] = 600.0,
) -> None:
    """Serve a base with many adapters over HTTP, in the forms of OpenAI's API.

    \b
    examples:
      lorakeet serve --adapter quotes=my-run/adapter
      lorakeet serve --model HuggingFaceTB/SmolLM2-135M-Instruct --bits 8 --adapters my-adapters --port 8000
      lorakeet serve --adapters my-adapters --api-key-file keys.txt --admin-key-file admins.txt
    \f

    Args:
        settings: Settings set by flags, by dotted name; every other parameter has its help text.
    """
    from lorakeet.serve.http import check_libraries

    import_late("datasets")  # only encoders read rows
    check_libraries()
    from lorakeet.serve.http.server import bind, run

    config = read_run(None, values=settings)
    named = _named_adapters(adapter or [], adapters)
    keys = _keys(api_key_file, admin_key_file, host)
    bound = bind(host, port)
    with bound:
        from lorakeet.serve.http.app import make_app
        from lorakeet.serve.http.service import Limits
        from lorakeet.serve.http.start import Served, open_service

        service = open_service(
            config.base,
            Served(adapters, named, name, config.task.type, allow_hub),
            keys=keys,
            limits=Limits(max_tokens, timeout),
            engine={"max_rows": max_rows, "queue": queue, "cache_bytes": cache_mb << 20},
        )
        _print_table(service)
        run(make_app(service, hosts=allow_host or (), origins=allow_origin or ()), bound, drain=timeout)


def _named_adapters(words: list[str], folder: Path | None) -> dict[str, Path]:
    """Return name and folder of each ``--adapter``, and check the folder of ``--adapters``.

    Raises:
        ConfigError: A word is no NAME=FOLDER, a name is given twice, or a folder does not exist.
    """
    if folder is not None and not is_dir(folder):
        raise ConfigError(
            f"--adapters = {folder}: expected a folder", "give the folder that holds the adapters' folders"
        )
    named: dict[str, Path] = {}
    for word in words:
        name, equals, place = word.partition("=")
        if not equals or not is_plain_name(name) or not place:
            raise ConfigError(f"--adapter = {word!r}: expected NAME=FOLDER", "write --adapter quotes=my-run/adapter")
        if name in named:
            raise ConfigError(f"--adapter: {name!r} is given twice", "give each adapter a name of its own")
        if not is_dir(place):
            raise ConfigError(f"--adapter {name}: {place} is no folder", "give the folder of an adapter")
        named[name] = Path(place).absolute()
    return named


def _keys(users: Path | None, admins: Path | None, host: str) -> Keys:
    """Return the keys of the files.

    Raises:
        ConfigError: A file is no file of keys, or there is none and others than this machine reach the server.
    """
    from lorakeet.serve.http.access.keys import Keys, read_keys
    from lorakeet.serve.http.server import is_loopback

    if users is None and admins is not None:
        raise ConfigError("there are keys of admins and none of callers", "add --api-key-file; it may be the same file")
    if users is None and not is_loopback(host):
        raise ConfigError(
            f"--host {host} is open to other machines, and there is no key",
            "add --api-key-file with a key on each line",
        )
    return Keys.of(read_keys(users) if users else (), read_keys(admins) if admins else ())


def _print_table(service: Service) -> None:
    """Print what is served to stderr."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from lorakeet.security.shown import printable

    table = Table("model", "version", "rank", "MB", box=None, pad_edge=False)
    table.add_row(escape(printable(service.base_name)), "base", "", "")
    for one in service.engine.residents.list():
        table.add_row(escape(printable(one.name)), str(one.version), str(one.rank), f"{one.bytes / 1e6:.1f}")
    Console(stderr=True, highlight=False).print(table)
