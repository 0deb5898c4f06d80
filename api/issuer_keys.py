"""The keys of an OpenID Connect issuer, which changes them as it likes.

They are kept for some minutes, asked for anew when a token names one that is not known, or does not
fit the one it names, and used for a day while the issuer does not answer. Whoever sends tokens can
make us ask every few seconds and no more, and nobody whose key is known waits for the answer.
"""

import json
import logging
import threading
from dataclasses import dataclass
from time import monotonic

import httpx
from joserfc import jwk
from joserfc.errors import JoseError

from stratocache.cache.configuration import OidcSettings
from stratocache.cache.errors import Unreachable

log = logging.getLogger(__name__)

_KEY_TYPES = ("RSA", "EC", "OKP")
_KEYS_BYTES_MAX = 1024**2
_FRESH_S = 600.0
_USABLE_S = 24 * 3600.0
_PAUSE_S = 5.0
"""Between two questions to an issuer, and so how long a new key may not be known."""
_FIRST_PAUSE_S = 1.0
"""The same, as long as there is no key at all."""
_TIMEOUT_S = 5.0
_WAITING_MAX = 8
"""Requests that wait for an answer: each has a thread that others want."""


@dataclass(frozen=True)
class _Known:
    """What the issuer said last."""

    content: bytes
    keys: tuple[jwk.Key, ...]
    read_at: float
    """On the monotonic clock."""


class IssuerKeys:
    """The keys of one issuer, by their ids; any thread may use them."""

    def __init__(self, settings: OidcSettings) -> None:
        self._settings = settings
        self._asking = threading.Lock()
        self._waiting = threading.BoundedSemaphore(_WAITING_MAX)
        self._known = _Known(b"", (), -_USABLE_S)
        self._asked_at = -_PAUSE_S

    def find(self, key_id: str | None) -> jwk.Key | None:
        """Return a key; None when the issuer has no such key, as far as it was asked lately.

        Raises `Unreachable` (`issuer-unreachable`) when there is no way to know.
        """
        known = self._known
        if self._choose(key_id) is None:
            self._wait_for_answer()
        elif monotonic() - known.read_at > _FRESH_S:
            self.renew()
        if monotonic() - self._known.read_at > _USABLE_S:
            raise self._unreachable()
        return self._choose(key_id)

    def renew(self) -> bool:
        """Ask the issuer, unless somebody does or did a moment ago; tell whether keys have changed."""
        if not self._asking.acquire(blocking=False):
            return False
        try:
            return self._ask()
        finally:
            self._asking.release()

    def _choose(self, key_id: str | None) -> jwk.Key | None:
        keys = self._known.keys
        if key_id is None:
            return keys[0] if len(keys) == 1 else None
        return next((key for key in keys if key.kid == key_id), None)

    def _wait_for_answer(self) -> None:
        """Ask, or wait for the answer that somebody else is asking for."""
        if not self._waiting.acquire(blocking=False):
            raise self._unreachable()
        try:
            if not self._asking.acquire(timeout=_TIMEOUT_S):
                raise self._unreachable()
            try:
                self._ask()
            finally:
                self._asking.release()
        finally:
            self._waiting.release()

    def _ask(self) -> bool:
        known, now = self._known, monotonic()
        if now - self._asked_at < (_PAUSE_S if known.keys else _FIRST_PAUSE_S):
            return False
        try:
            content = self._read()
            changed = content != known.content
            keys = _public_keys(content) if changed else known.keys
            self._known = _Known(content, keys, now)
        except (OSError, httpx.HTTPError, ValueError, TypeError, KeyError) as error:
            log.warning("the keys of %s cannot be read: %s", self._settings.issuer, error)
            return False
        finally:
            self._asked_at = monotonic()
        return changed

    def _read(self) -> bytes:
        if self._settings.jwks_file is not None:
            with self._settings.jwks_file.open("rb") as file:
                return file.read(_KEYS_BYTES_MAX)
        assert self._settings.jwks_url is not None
        deadline, content = monotonic() + _TIMEOUT_S, b""
        with httpx.stream("GET", self._settings.jwks_url, timeout=_TIMEOUT_S) as answer:
            answer.raise_for_status()
            for part in answer.iter_bytes():
                content += part
                if len(content) > _KEYS_BYTES_MAX:
                    raise ValueError("too many keys")
                if monotonic() > deadline:
                    raise TimeoutError("the answer takes too long")
        return content

    def _unreachable(self) -> Unreachable:
        return Unreachable(
            "issuer-unreachable",
            f"The keys of {self._settings.issuer} cannot be had now; try again later.",
        )


def _public_keys(content: bytes) -> tuple[jwk.Key, ...]:
    """Read a JWK set (RFC 7517); keys that sign nothing here are left out, and of unknown kinds."""
    keys = []
    for fields in json.loads(content)["keys"]:
        if not isinstance(fields, dict):
            raise TypeError("a key is no object")
        if fields.get("kty") in _KEY_TYPES and fields.get("use", "sig") == "sig":
            try:
                keys.append(jwk.import_key(fields))
            except (JoseError, ValueError, TypeError, KeyError) as error:
                log.warning("a key of an issuer is left out: %s", error)
    return tuple(keys)
