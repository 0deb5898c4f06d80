"""Passwords, as argon2id hashes with the parameters that RFC 9106 recommends for little memory."""

import threading
from functools import cache
from typing import TYPE_CHECKING

from stratocache.cache.errors import Unreachable

if TYPE_CHECKING:
    from argon2 import PasswordHasher

_PARALLEL = 2
"""Each takes 64 MiB and tens of milliseconds of all processors."""
_TURN_S = 10.0

_turns = threading.BoundedSemaphore(_PARALLEL)


@cache
def _hasher() -> "PasswordHasher":
    from argon2 import PasswordHasher  # only in the processes that ever need it
    from argon2.profiles import RFC_9106_LOW_MEMORY

    return PasswordHasher.from_parameters(RFC_9106_LOW_MEMORY)


@cache
def _decoy() -> str:
    return _hasher().hash("what nobody's password is judged by")


def hash_password(password: str) -> str:
    """Return what is stored of a password; raises `Unreachable` (`server-busy`)."""
    with _Turn():
        return _hasher().hash(password)


def is_right(stored: str | None, password: str) -> bool:
    """Tell whether a password is the one of a hash; without a hash, no, with the same work.

    Raises `Unreachable` (`server-busy`).
    """
    from argon2.exceptions import Argon2Error, InvalidHashError

    with _Turn():
        try:
            _hasher().verify(stored or _decoy(), password)
        except (Argon2Error, InvalidHashError):
            return False
    return stored is not None


class _Turn:
    """One of few that hash at a time."""

    def __enter__(self) -> None:
        if not _turns.acquire(timeout=_TURN_S):
            raise Unreachable(
                "server-busy", "Too many log-ins are under way; try again in a moment."
            )

    def __exit__(self, *_unused: object) -> None:
        _turns.release()
