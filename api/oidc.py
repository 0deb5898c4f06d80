"""OpenID Connect: tokens of issuers that the configuration names, judged by the issuers' keys.

Only signatures of private keys count, so that no key that everybody can read is taken for a secret.
"""

import base64
import json
import re
from collections.abc import Sequence
from typing import Any

from joserfc import jwk, jwt
from joserfc.errors import BadSignatureError, JoseError

from stratocache.api.issuer_keys import IssuerKeys
from stratocache.cache.configuration import OidcSettings
from stratocache.fs.accounts import SUPERUSER
from stratocache.fs.records import ROLES, Caller, Role

_ALGORITHMS = (
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "Ed25519",
    "EdDSA",
)  # fmt: skip
_TOKEN_CHARACTERS_MAX = 16 * 1024
_LEEWAY_S = 60
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
        self._keys = IssuerKeys(settings)
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
        try:
            found = self._decode(token)
            self._registry.validate(found.claims)
        except (JoseError, ValueError, TypeError) as error:
            raise TokenRefused(str(error) or type(error).__name__) from None
        return found.claims

    def _decode(self, token: str) -> jwt.Token:
        def key_of(item: jwk.GuestProtocol) -> jwk.Key:
            key = self._keys.find(item.headers().get("kid"))
            if key is None:
                raise TokenRefused("it names no key of its issuer")
            return key

        try:
            return jwt.decode(token, key_of, algorithms=_ALGORITHMS)
        except BadSignatureError:
            if not self._keys.renew():  # some issuers change a key and keep its name
                raise
            return jwt.decode(token, key_of, algorithms=_ALGORITHMS)

    def _role(self, claims: dict[str, Any]) -> Role:
        named = claims.get(self._settings.role_claim or "")
        values = named if isinstance(named, list) else [named]
        roles = [
            self._settings.roles[value]
            for value in values
            if isinstance(value, str) and value in self._settings.roles
        ]
        return max(roles, key=ROLES.index, default="user")


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
