"""Tokens of OpenID Connect issuers: who they make somebody, and what is not believed."""

import base64
import hashlib
import hmac
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from joserfc.jwk import RSAKey
from support.api_daemon import Api, problem
from support.network_client import add_account, stranger
from support.oidc_issuer import AUDIENCE, Issuer, issuing

from stratocache.api import issuer_keys
from stratocache.cache.configuration import ApiSettings, Configuration, OidcSettings

TIMEOUT_S = 30


@dataclass
class Clock:
    """What those who keep an issuer's keys take for the time."""

    now_s: float = 1000


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that stands still until it is put forward."""
    made = Clock()
    monkeypatch.setattr(issuer_keys, "monotonic", lambda: made.now_s)
    return made


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    """A running issuer."""
    with issuing() as made:
        yield made


@pytest.fixture
def api(configuration: Configuration, issuer: Issuer) -> Iterator[Api]:
    """The application, which believes the issuer."""
    made = Api(believing(configuration, issuer))
    yield made
    made.db.close()


def believing(configuration: Configuration, issuer: Issuer, **changes: Any) -> Configuration:
    """Return a configuration that believes an issuer."""
    settings = {
        "issuer": issuer.url, "audience": AUDIENCE, "jwks_url": f"{issuer.url}/keys",
        "role_claim": "groups", "roles": {"operators": "operator", "admins": "admin"}, **changes,
    }  # fmt: skip
    believed = OidcSettings.model_validate(
        {name: value for name, value in settings.items() if value is not None}
    )
    api = configuration.api.model_copy(update={"oidc": (believed,)})
    return configuration.model_copy(update={"api": api})


def who(api: Api, token: str) -> tuple[str, str]:
    """Return name and role that a token gives."""
    answer = stranger(api).with_token(token)("GET", "/v1/session")
    assert answer.status_code == 200, answer.text
    return answer.json["name"], answer.json["role"]


def test_issuer_says_who_somebody_is(api: Api, issuer: Issuer) -> None:
    """The configured claim is the name; a group gives the highest role it is mapped to; an account
    of that name has its own role."""
    add_account(api.db, "olga", "operator")

    assert who(api, issuer.token("jane")) == ("jane", "user")
    assert who(api, issuer.token("jane", groups=["staff", "operators"])) == ("jane", "operator")
    assert who(api, issuer.token("jane", groups=["operators", "admins"])) == ("jane", "admin")
    assert who(api, issuer.token("jane", groups="admins")) == ("jane", "admin")
    assert who(api, issuer.token("jane", groups={"admins": 1})) == ("jane", "user")
    assert who(api, issuer.token("olga", groups=["admins"])) == ("olga", "operator")
    assert who(api, issuer.token("jane", aud=["other", AUDIENCE])) == ("jane", "user")
    assert issuer.asked == 1


def test_every_kind_of_key_is_believed(api: Api, issuer: Issuer) -> None:
    """RSA, elliptic curves and Ed25519 sign; a key that the issuer has since yesterday is found."""
    issuer.add_key("curve", "EC")
    issuer.add_key("edwards", "OKP")

    assert who(api, issuer.token("a", algorithm="PS256"))[0] == "a"
    assert who(api, issuer.token("b", key_id="curve", algorithm="ES256"))[0] == "b"
    assert who(api, issuer.token("c", key_id="edwards", algorithm="Ed25519"))[0] == "c"


def test_tokens_that_are_not_believed(api: Api, issuer: Issuer) -> None:
    """Over, early, for somebody else, of somebody else, of no name, or of a name that nobody may
    claim: all are nobody."""
    now = int(time.time())
    for claims in (
        {"exp": now - 120}, {"exp": None}, {"nbf": now + 600}, {"iat": now + 600},
        {"aud": "another"}, {"aud": None}, {"iss": "https://evil.example"}, {"iss": None},
        {"preferred_username": 7}, {"preferred_username": "no blanks"}, {"exp": "soon"},
        {"preferred_username": "root"}, {"preferred_username": None}, {"aud": {"a": AUDIENCE}},
    ):  # fmt: skip
        token = issuer.token("jane", **claims)
        answer = stranger(api).with_token(token)("GET", "/v1/session")
        document = problem(answer, 401, "not-authenticated")
        assert token not in json.dumps(document)
    assert who(api, issuer.token("jane", exp=now - 30))[0] == "jane"  # clocks differ


def test_forged_tokens_are_not_believed(api: Api, issuer: Issuer) -> None:
    """No signature, the public key as a secret, another's key under the same name, a changed claim,
    or no token at all: nobody."""
    good = issuer.token("jane")
    header, payload, signature = good.split(".")
    public, first = issuer.key_set(), issuer.keys["first"]
    assert isinstance(first, RSAKey)
    other = Issuer()
    other.url = issuer.url
    forged = encoded({**decoded(payload), "groups": ["admins"]})
    for token in (
        f"{encoded({'alg': 'none', 'kid': 'first'})}.{payload}.",
        f"{encoded({'alg': 'none'})}.{payload}.",
        hmac_token({"alg": "HS256", "kid": "first"}, payload, public),
        hmac_token({"alg": "HS256"}, payload, first.as_pem(private=False)),
        f"{header}.{forged}.{signature}",
        f"{header}.{payload}.{'A' * len(signature)}",
        other.token("jane"),
        f"{encoded({'alg': 'RS256', 'kid': 'unknown'})}.{payload}.{signature}",
        f"{encoded({'alg': 'RS256', 'jwk': json.loads(other.key_set())['keys'][0]})}.{payload}.x",
        "a.b.c", "..", f"{header}.{payload}", f"{good}.x.y", "é.é.é".encode().decode("latin-1"),
        f"{header}.{base64.urlsafe_b64encode(b'[' * 9000).decode()}.{signature}", "x" * 20_000,
    ):  # fmt: skip
        answer = stranger(api).with_token(token)("GET", "/v1/session")
        problem(answer, 401, "not-authenticated")


def test_issuer_that_is_down_costs_nothing_at_first(
    configuration: Configuration, api: Api, issuer: Issuer
) -> None:
    """Known keys go on being believed while the issuer is down; without any the answer is to try
    again, not that one is nobody."""
    token = issuer.token("jane")
    assert who(api, token)[0] == "jane"
    issuer.broken = True
    assert who(api, token)[0] == "jane"
    fresh = Api(believing(configuration, issuer))
    answer = stranger(fresh).with_token(token)("GET", "/v1/session")
    problem(answer, 503, "issuer-unreachable")
    fresh.db.close()


def test_new_keys_are_found(api: Api, issuer: Issuer, clock: Clock) -> None:
    """A key that the issuer has had since its keys were read is found at once, unless they were read
    seconds ago; one that it has no more is believed no more; nothing is restarted."""
    assert who(api, issuer.token("jane"))[0] == "jane"
    for number in range(3):
        old = next(iter(issuer.keys))
        issuer.add_key(f"next-{number}", "EC")
        new = issuer.token("jane", key_id=f"next-{number}", algorithm="ES256")
        problem(stranger(api).with_token(new)("GET", "/v1"), 401, "not-authenticated")
        clock.now_s += 6
        assert who(api, new)[0] == "jane"
        token = issuer.token("jane", key_id=old, algorithm="ES256" if number else "RS256")
        del issuer.keys[old]
        assert who(api, token)[0] == "jane"
        clock.now_s += 601
        problem(stranger(api).with_token(token)("GET", "/v1"), 401, "not-authenticated")


def test_keys_that_change_under_their_name_are_found(
    api: Api, issuer: Issuer, clock: Clock
) -> None:
    """An issuer may change its key and call it the same, or call it nothing; what somebody else has
    signed does not make us ask all the time."""
    old = issuer.token("jane")
    assert who(api, old)[0] == "jane"
    issuer.add_key("first", "RSA")
    new = issuer.token("jane")
    clock.now_s += 6

    assert who(api, new)[0] == "jane"

    clock.now_s += 6
    for _ in range(5):
        problem(stranger(api).with_token(old)("GET", "/v1"), 401, "not-authenticated")
    assert issuer.asked == 3


def test_unknown_keys_do_not_make_us_ask_at_once_again(
    api: Api, issuer: Issuer, clock: Clock
) -> None:
    """A flood of tokens that name keys nobody has is not a flood to the issuer, and keeps none of its
    new keys from being found."""
    assert who(api, issuer.token("jane"))[0] == "jane"
    payload = issuer.token("jane").split(".")[1]

    def flood(number: int) -> None:
        token = f"{encoded({'alg': 'RS256', 'kid': f'no-{number}'})}.{payload}.c2ln"
        problem(stranger(api).with_token(token)("GET", "/v1"), 401, "not-authenticated")

    for number in range(30):
        flood(number)
        clock.now_s += 1

    assert issuer.asked == 6
    issuer.add_key("second", "EC")
    new = issuer.token("jane", key_id="second", algorithm="ES256")
    for number in range(6):
        clock.now_s += 1
        flood(number)
    assert who(api, new)[0] == "jane"


def test_an_issuer_that_is_slow_holds_up_nobody_who_is_known(
    api: Api, issuer: Issuer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the issuer does not answer about keys that nobody has, known ones are believed, few wait,
    and others are told to try again."""
    token = issuer.token("jane")
    assert who(api, token)[0] == "jane"
    header, payload = encoded({"alg": "RS256", "kid": "none"}), token.split(".")[1]
    clock.now_s += 601  # the keys are old, too
    monkeypatch.setattr(issuer_keys, "_TIMEOUT_S", 60.0)
    issuer.answers.clear()
    statuses: list[int] = []

    def ask() -> None:
        unknown = stranger(api).with_token(f"{header}.{payload}.c2ln")
        statuses.append(unknown("GET", "/v1").status_code)

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + TIMEOUT_S
    while len(statuses) < 4 or issuer.asked < 2:
        assert time.monotonic() < deadline, statuses
        time.sleep(0.01)
    assert who(api, token)[0] == "jane"
    assert statuses == [503] * 4
    issuer.answers.set()
    for thread in threads:
        thread.join()

    assert sorted(statuses) == [401] * 8 + [503] * 4
    assert issuer.asked == 2


def test_an_issuer_that_is_down_is_not_asked_each_time(
    configuration: Configuration, issuer: Issuer, clock: Clock
) -> None:
    """Without any key whoever comes is told to try again, and the issuer is asked once a second."""
    issuer.broken = True
    api = Api(believing(configuration, issuer))
    token = issuer.token("jane")
    for _ in range(20):
        answer = stranger(api).with_token(token)("GET", "/v1/session")
        problem(answer, 503, "issuer-unreachable")
    assert issuer.asked == 1
    issuer.broken = False
    clock.now_s += 1.1
    assert who(api, token)[0] == "jane"
    clock.now_s += 3600
    issuer.broken = True
    for _ in range(20):
        assert who(api, token)[0] == "jane"
    assert issuer.asked == 3
    api.db.close()


def test_keys_of_unknown_kinds_are_left_out(api: Api, issuer: Issuer) -> None:
    """Keys that nobody here can use, or that are damaged, keep none of the others from counting."""
    issuer.extra_keys = [
        {"kty": "AKP", "alg": "ML-DSA-44", "kid": "a", "pub": "AA"},
        {"kty": "EC", "crv": "no-such-curve", "kid": "b", "x": "AA", "y": "AA"},
        {"kty": "RSA", "kid": "c", "n": "!", "e": "AQAB"}, {"kty": "OKP", "kid": "d"},
    ]  # fmt: skip
    assert who(api, issuer.token("jane"))[0] == "jane"


def test_keys_in_a_file(configuration: Configuration, issuer: Issuer, tmp_path: Path) -> None:
    """Keys may be in a file, and a prefix keeps an issuer's users apart from all others."""
    keys = tmp_path / "keys.json"
    keys.write_bytes(issuer.key_set())
    changes = {"jwks_url": None, "jwks_file": keys, "prefix": "corp-", "user_claim": "sub"}
    made = Api(believing(configuration, issuer, **changes))

    assert who(made, issuer.token(None, sub="root")) == ("corp-root", "user")
    assert issuer.asked == 0
    made.db.close()


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"issuer": "https://a", "audience": "b"}, "jwks_file or jwks_url"),
        ({"issuer": "https://a", "audience": "b", "jwks_url": "http://keys.example.org/"}, "https"),
        ({"issuer": "a", "audience": "b", "jwks_file": "/k"}, "pattern"),
    ],
)
def test_settings_that_would_believe_anybody(settings: dict[str, Any], part: str) -> None:
    """Keys come from a file or over https, from one of them."""
    with pytest.raises(ValueError, match=part):
        OidcSettings.model_validate(settings)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"address": "0.0.0.0", "tls": False}, "loopback"),
        ({"address": "example.org"}, "IP address"),
        ({"certificate_file": "/c"}, "go together"),
    ],
)
def test_settings_that_would_show_passwords(settings: dict[str, Any], part: str) -> None:
    """Without TLS only this machine is served; what cannot be meant is refused."""
    with pytest.raises(ValueError, match=part):
        ApiSettings.model_validate(settings)


def encoded(document: dict[str, Any]) -> str:
    """Return a part of a token."""
    return base64.urlsafe_b64encode(json.dumps(document).encode()).decode().rstrip("=")


def decoded(part: str) -> dict[str, Any]:
    """Read a part of a token."""
    found: dict[str, Any] = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    return found


def hmac_token(header: dict[str, Any], payload: str, secret: bytes) -> str:
    """Return a token whose signature anybody can make who knows a public key."""
    signed = f"{encoded(header)}.{payload}"
    signature = hmac.new(secret, signed.encode(), hashlib.sha256).digest()
    return f"{signed}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"
