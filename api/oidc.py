"""OpenID Connect: tokens of issuers that the configuration names, judged by the issuers' keys.

Only signatures of private keys count, so that no key that everybody can read is taken for a secret.
Keys are kept for some minutes, fetched anew when a token names one that is not known, and, while an
issuer does not answer, used for a day.
"""

import base64
import json
import logging
import re
import threading
import time
from collections.abc import Sequence
from typing import Any

import httpx
from joserfc import jwk, jwt
from joserfc.errors import JoseError

from stratocache.cache.configuration import OidcSettings
from stratocache.cache.errors import Unreachable
from stratocache.fs.accounts import SUPERUSER
from stratocache.fs.records import ROLES, Caller, Role

log = logging.getLogger(__name__)

_ALGORITHMS = (
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "Ed25519",
    "EdDSA",
)  # fmt: skip
_KEY_TYPES = ("RSA", "EC", "OKP")
_TOKEN_CHARACTERS_MAX = 16 * 1024
_KEYS_BYTES_MAX = 1024**2
_LEEWAY_S = 60
_FRESH_S = 600.0
_USABLE_S = 24 * 3600.0
_PAUSE_S = 10.0
"""Between two questions to an issuer."""
_TIMEOUT_S = 5.0
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,63}")


class TokenRefused(Exception):
    """A token that is not believed; the text says why, for the log."""


class Issuers:
    """All issuers that are believed. Methods block and may run in any thread."""

    def __init__(self, settings: Sequence[OidcSettings]) -> None:
        self._issuers = {item.issuer: _Issuer(item) for item in settings}

    def identify(self, token: str) -> Caller:
        """Return who somebody is, were there no account of that name.

        Raises `TokenRefused`, and `Unreachable` (`issuer-unreachable`) when there are no keys.
        """
        issuer = self._issuers.get(_claimed_issuer(token))
        if issuer is None:
            raise TokenRefused("it is of no issuer that is configured")
        return issuer.identify(token)


class _Issuer:
    def __init__(self, settings: OidcSettings) -> None:
        self._settings = settings
        self._keys = _Keys(settings)
        self._registry = jwt.JWTClaimsRegistry(
            leeway=_LEEWAY_S,
            iss={"essential": True, "value": settings.issuer},
            aud={"essential": True, "value": settings.audience},
            exp={"essential": True},
        )

    def identify(self, token: str) -> Caller:
        settings = self._settings
        claims = self._claims(token)
        name = claims.get(settings.user_claim)
        if not isinstance(name, str):
            raise TokenRefused(f"it has no {settings.user_claim}")
        name = settings.prefix + name
        if not _NAME.fullmatch(name) or name == SUPERUSER:
            raise TokenRefused(f"{name[:64]!r} cannot be a user's name here")
        return Caller(name, self._role(claims))

    def _claims(self, token: str) -> dict[str, Any]:
        def key_of(item: jwk.GuestProtocol) -> jwk.Key:
            return self._keys.find(item.headers().get("kid"))

        try:
            found = jwt.decode(token, key_of, algorithms=_ALGORITHMS)
            self._registry.validate(found.claims)
        except (JoseError, ValueError, TypeError) as error:
            raise TokenRefused(str(error) or type(error).__name__) from None
        return found.claims

    def _role(self, claims: dict[str, Any]) -> Role:
        named = claims.get(self._settings.role_claim or "")
        values = named if isinstance(named, list) else [named]
        roles = [
            self._settings.roles[value]
            for value in values
            if isinstance(value, str) and value in self._settings.roles
        ]
        return max(roles, key=ROLES.index, default="user")


class _Keys:
    """The keys of one issuer, by their ids."""

    def __init__(self, settings: OidcSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._keys: list[jwk.Key] = []
        self._read_at = -_USABLE_S
        self._asked_at = -_PAUSE_S

    def find(self, key_id: str | None) -> jwk.Key:
        """Return a key; raises `TokenRefused` and `Unreachable`."""
        with self._lock:
            if time.monotonic() - self._read_at > _FRESH_S or self._choose(key_id) is None:
                self._refresh()
            key = self._choose(key_id)
        if key is None:
            raise TokenRefused("it names no key of its issuer")
        return key

    def _choose(self, key_id: str | None) -> jwk.Key | None:
        if key_id is None:
            return self._keys[0] if len(self._keys) == 1 else None
        return next((key for key in self._keys if key.kid == key_id), None)

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._asked_at < _PAUSE_S and self._keys:
            return
        self._asked_at = now
        try:
            self._keys = _public_keys(self._read())
            self._read_at = now
        except (OSError, httpx.HTTPError, ValueError, TypeError, KeyError, JoseError) as error:
            log.warning("the keys of %s cannot be read: %s", self._settings.issuer, error)
            if now - self._read_at > _USABLE_S:
                self._keys = []
                raise Unreachable(
                    "issuer-unreachable",
                    f"The keys of {self._settings.issuer} cannot be had now; try again later.",
                ) from None

    def _read(self) -> bytes:
        if self._settings.jwks_file is not None:
            with self._settings.jwks_file.open("rb") as file:
                return file.read(_KEYS_BYTES_MAX)
        assert self._settings.jwks_url is not None
        content = b""
        with httpx.stream("GET", self._settings.jwks_url, timeout=_TIMEOUT_S) as answer:
            answer.raise_for_status()
            for part in answer.iter_bytes():
                content += part
                if len(content) > _KEYS_BYTES_MAX:
                    raise ValueError("too many keys")
        return content


def _public_keys(content: bytes) -> list[jwk.Key]:
    """Read a JWK set (RFC 7517); keys that sign nothing here are left out."""
    keys = []
    for fields in json.loads(content)["keys"]:
        if fields.get("kty") in _KEY_TYPES and fields.get("use", "sig") == "sig":
            keys.append(jwk.import_key(fields))
    return keys


def _claimed_issuer(token: str) -> str:
    """Return the issuer that a token names, which proves nothing yet."""
    parts = token.split(".")
    if len(parts) != 3 or len(token) > _TOKEN_CHARACTERS_MAX:
        raise TokenRefused("it is no signed token")
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (ValueError, RecursionError):
        raise TokenRefused("it is no signed token") from None
    issuer = claims.get("iss") if isinstance(claims, dict) else None
    return issuer if isinstance(issuer, str) else ""
