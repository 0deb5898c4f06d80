"""A real issuer of OpenID Connect tokens: its keys are on an HTTP server of its own."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from joserfc import jwt
from joserfc.jwk import ECKey, Key, OKPKey, RSAKey

from support.web_server import Handler, serving

AUDIENCE = "stratocache"
_HELD_S_MAX = 60


class Issuer:
    """Makes keys and tokens, and says which keys it has."""

    def __init__(self) -> None:
        self.keys: dict[str, Key] = {}
        self.asked = 0
        self.broken = False
        self.answers = threading.Event()
        """Unless it is set, nobody gets an answer."""
        self.answers.set()
        self.extra_keys: list[dict[str, str]] = []
        """Of kinds that nobody here knows."""
        self.url = ""
        self.add_key("first", "RSA")

    def add_key(self, key_id: str, kind: str) -> None:
        """Have another key."""
        made: Key
        if kind == "RSA":
            made = RSAKey.generate_key(2048, {"kid": key_id})
        elif kind == "EC":
            made = ECKey.generate_key("P-256", {"kid": key_id})
        else:
            made = OKPKey.generate_key("Ed25519", {"kid": key_id})
        self.keys[key_id] = made

    def key_set(self) -> bytes:
        """Return the public keys as a JWK set."""
        keys = [{**key.as_dict(private=False), "use": "sig"} for key in self.keys.values()]
        return json.dumps({"keys": [*self.extra_keys, *keys]}).encode()

    def token(
        self, name: str | None, *, key_id: str = "first", algorithm: str = "RS256", **claims: Any
    ) -> str:
        """Return a token that says who somebody is; a claim that is None is left out."""
        now = int(time.time())
        all_claims = {
            "iss": self.url, "aud": AUDIENCE, "exp": now + 300, "iat": now, "sub": "4711",
            "preferred_username": name, **claims,
        }  # fmt: skip
        header = {"alg": algorithm, "kid": key_id}
        given = {key: value for key, value in all_claims.items() if value is not None}
        return jwt.encode(header, given, self.keys[key_id], algorithms=[algorithm])


@contextmanager
def issuing() -> Iterator[Issuer]:
    """Run an issuer until the end of the block."""
    issuer = Issuer()

    class KeySet(Handler):
        def do_GET(self) -> None:
            issuer.asked += 1
            issuer.answers.wait(_HELD_S_MAX)
            content = issuer.key_set()
            self.send_response(500 if issuer.broken else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    with serving(KeySet) as issuer.url:
        try:
            yield issuer
        finally:
            issuer.answers.set()
