"""Keys of callers: read from files, compared in constant time, never shown."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lorakeet.errors import ConfigError
from lorakeet.security.paths import is_file
from lorakeet.text_files import NotTextError, all_lines

#: Characters of the shortest key that is taken.
SHORTEST = 16


def _digest(key: str) -> bytes:
    """Return the hash of a key; hashes have one length, so that their comparison takes one time."""
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()


@dataclass(frozen=True)
class Keys:
    """Keys that open the server, as their hashes; without any, every caller may use it.

    Attributes:
        users: Keys of callers.
        admins: Keys of those who may also load and unload adapters.
    """

    users: tuple[bytes, ...] = field(default=(), repr=False)
    admins: tuple[bytes, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, users: Sequence[str] = (), admins: Sequence[str] = ()) -> Keys:
        """Return the keys with these texts."""
        return cls(tuple(map(_digest, users)), tuple(map(_digest, admins)))

    @property
    def are_set(self) -> bool:
        """Whether a caller needs a key."""
        return bool(self.users or self.admins)

    def opens(self, header: str | None) -> bool:
        """Whether a header ``Authorization`` lets a caller in."""
        return not self.are_set or self._holds(header, (*self.users, *self.admins))

    def is_admin(self, header: str | None) -> bool:
        """Whether a header ``Authorization`` has the key of an admin; without such keys there is no admin."""
        return self._holds(header, self.admins)

    def _holds(self, header: str | None, known: Sequence[bytes]) -> bool:
        scheme, _, key = (header or "").partition(" ")
        given = _digest(key.strip())
        matches = [hmac.compare_digest(given, one) for one in known]  # all of them, so that the time tells nothing
        return scheme.lower() == "bearer" and any(matches)


def read_keys(path: Path) -> list[str]:
    """Return the keys of a file, one a line; empty lines and lines that begin with # do not count.

    Raises:
        ConfigError: There is no such file, it has no key, or one is short or has white space.
    """
    if not is_file(path):
        raise ConfigError(f"{path} is no file, expected one with a key on each line", "write a key into it")
    try:
        lines = [line.strip() for line in all_lines(path)]
    except NotTextError as error:
        raise ConfigError(f"{path}: {error.message}", error.hint) from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"{path} has no key, expected one on each line", "write a key into it")
    if bad := [
        str(lines.index(key) + 1) for key in keys if len(key) < SHORTEST or not key.isascii() or key.split()[1:]
    ]:
        raise ConfigError(
            f"{path}: line {', '.join(bad)} is no key, expected {SHORTEST} or more signs of ASCII without white space",
            "python -c 'import secrets; print(secrets.token_urlsafe(32))' writes a good one",
        )
    return keys
