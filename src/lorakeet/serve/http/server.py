"""The server's process: a socket that is bound before the model is loaded, uvicorn, and a stop that drains."""

from __future__ import annotations

import ipaddress
import logging
import signal
import socket

import uvicorn

from lorakeet.errors import ConfigError
from lorakeet.log import info
from lorakeet.serve.http.access.gate import Gate


def bind(host: str, port: int) -> socket.socket:
    """Return a socket for an address; it takes no connection before the server starts.

    Raises:
        ConfigError: The address is taken, or not one of this machine.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except (OSError, UnicodeError, OverflowError) as error:
        bound.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot listen at {host} port {port}: {reason}", "choose another --port or --host") from None
    return bound


def is_loopback(host: str) -> bool:
    """Whether only callers on this machine reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def address(bound: socket.socket) -> str:
    """Return the address of a socket, as a browser writes it."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """Server that tells when it takes requests."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started and sockets:
            info(f"ready      {address(sockets[0])}")


def run(app: Gate, bound: socket.socket, *, drain: float) -> None:
    """Serve until SIGTERM or Ctrl-C; answers under way are finished first.

    Args:
        app: See :func:`lorakeet.serve.http.app.make_app`.
        bound: See :func:`bind`.
        drain: Seconds that the answers under way may take after the signal.
    """
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # no line for each request, and no texts of callers
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises the signal again at its end
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="on",
        timeout_graceful_shutdown=max(1, round(drain)),
    )
    _Server(config).run(sockets=[bound])
