"""Logging in over HTTP: cookies, what protects them from other sites, and the ration of guesses."""

import time
from dataclasses import dataclass

import pytest
from support.api_daemon import Api, Requests, problem
from support.network_client import PASSWORD, Stranger, add_account, log_in, stranger

from stratocache.cache.configuration import Configuration
from stratocache.fs import sessions
from stratocache.fs.login_ration import WRONG_PER_ADDRESS, WRONG_PER_NAME, reserve_attempt
from stratocache.fs.state import later

pytestmark = pytest.mark.root  # callers are root, or are made from root

DISK = {"size_bytes": 2**20}


@dataclass
class Clock:
    """What sessions take for the time."""

    ahead_s: float = 0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock of sessions that can be put forward."""
    made = Clock()
    monkeypatch.setattr(sessions, "later", lambda seconds: later(seconds + made.ahead_s))
    monkeypatch.setattr(sessions, "now", lambda: later(made.ahead_s))
    return made


@pytest.fixture
def world(api: Api, root: Requests) -> Stranger:
    """The account ann (admin), and the network she comes over."""
    add_account(api.db, "ann", "admin")
    return stranger(api)


def test_cookie_is_kept_from_scripts_and_other_sites(world: Stranger) -> None:
    """Over TLS the cookie is bound to this host, secure, and out of reach of scripts and sites."""
    answer = world("POST", "/v1/session", {"name": "ann", "password": PASSWORD})

    assert answer.status_code == 201
    header = answer.headers["set-cookie"]
    assert header.startswith("__Host-stratocache=")
    for attribute in ("HttpOnly", "SameSite=Strict", "Secure", "Path=/", "Max-Age="):
        assert attribute in header
    assert "Domain" not in header
    assert answer.json.keys() == {"name", "role", "scopes", "csrf_token", "expires_at", "idle_s"}
    assert (answer.json["name"], answer.json["role"]) == ("ann", "admin")
    plain = Stranger(world.client, protocol="http")
    again = plain("POST", "/v1/session", {"name": "ann", "password": PASSWORD})
    assert again.headers["set-cookie"].startswith("stratocache=")
    assert "Secure" not in again.headers["set-cookie"]


def test_session_ends_when_one_logs_out(world: Stranger) -> None:
    """GET tells who one is; after DELETE the cookie is worth nothing, twice is no error."""
    ann = log_in(world, "ann")
    shown = ann("GET", "/v1/session").json
    assert (shown["name"], shown["csrf_token"]) == ("ann", ann.headers["X-CSRF-Token"])

    gone = ann("DELETE", "/v1/session")

    assert gone.status_code == 204
    assert "expires=Fri, 02 Jan 1970" in gone.headers["set-cookie"]
    problem(ann("GET", "/v1/session"), 401, "not-authenticated")
    assert log_in(world, "ann").headers["Cookie"] != ann.headers["Cookie"]


def test_session_ends_by_itself(api: Api, world: Stranger) -> None:
    """A cookie is worth nothing after its time."""
    ann = log_in(world, "ann")
    api.db.connection.execute("UPDATE sessions SET expires_at = created_at")

    problem(ann("GET", "/v1/session"), 401, "not-authenticated")


def test_session_that_nobody_uses_ends(
    configuration: Configuration, root: Requests, clock: Clock
) -> None:
    """Every use puts the end of a session off, up to twelve hours; what a page reads by a timer does
    not."""
    settings = configuration.api.model_copy(update={"session_idle_s": 3600})
    api = Api(configuration.model_copy(update={"api": settings}))
    add_account(api.db, "ann", "admin")
    world = stranger(api)
    ann, watching = log_in(world, "ann"), log_in(world, "ann")
    by_timer = {"X-Stratocache-Timer": "refresh"}
    assert ann("GET", "/v1/session").json["idle_s"] == 3600

    for _ in range(13):
        clock.ahead_s += 3300
        assert ann("GET", "/v1/session").status_code == 200
        if clock.ahead_s == 3300:
            assert watching("GET", "/v1/session", headers=by_timer).status_code == 200
        else:
            problem(watching("GET", "/v1/session"), 401, "not-authenticated")
    clock.ahead_s += 3300
    problem(ann("GET", "/v1/session"), 401, "not-authenticated")

    ann = log_in(world, "ann")
    clock.ahead_s += 3500
    changing = ann("POST", "/v1/accounts", {"name": "bob"}, headers=by_timer)
    assert changing.status_code == 201
    clock.ahead_s += 3500
    assert ann("GET", "/v1/session").status_code == 200
    clock.ahead_s += 3601
    problem(ann("GET", "/v1/session"), 401, "not-authenticated")
    assert log_in(world, "ann")
    assert len(api.db.rows("SELECT * FROM sessions")) == 1
    api.db.close()


def test_use_of_a_session_is_not_written_each_time(api: Api, world: Stranger, clock: Clock) -> None:
    """Requests that come soon after each other write nothing, and one on a full disk reads."""
    ann = log_in(world, "ann")
    clock.ahead_s += 30
    before = api.db.row("SELECT used_at FROM sessions")

    assert ann("GET", "/v1/session").status_code == 200
    assert api.db.row("SELECT used_at FROM sessions") == before

    clock.ahead_s += 60
    with api.db.transaction() as connection:
        connection.execute("PRAGMA query_only = ON")
    assert ann("GET", "/v1/session").status_code == 200
    connection.execute("PRAGMA query_only = OFF")
    assert api.db.row("SELECT used_at FROM sessions") == before
    assert ann("GET", "/v1/session").status_code == 200
    assert api.db.row("SELECT used_at FROM sessions") != before


def test_who_one_is_needs_no_cookie(root: Requests, world: Stranger) -> None:
    """A token, or the Unix socket, says who one is too; only a cookie has a CSRF token."""
    made = root("POST", "/v1/accounts/ann/tokens", {"scopes": ["read"]}).json
    token = world.with_token(made["token"])

    shown = token("GET", "/v1/session").json

    assert (shown["name"], shown["scopes"], shown["csrf_token"]) == ("ann", ["read"], None)
    assert token("DELETE", "/v1/session").status_code == 204
    assert token("GET", "/v1/session").status_code == 200
    assert root("GET", "/v1/session").json["role"] == "admin"
    problem(world("GET", "/v1/session"), 401, "not-authenticated")


def test_changes_by_cookie_need_the_csrf_token(world: Stranger) -> None:
    """With the cookie alone one can read; to change something a page must know its session's token."""
    ann = log_in(world, "ann")
    other = log_in(world, "ann")
    token = ann.headers.pop("X-CSRF-Token")

    assert ann("GET", "/v1/disks").status_code == 200
    for wrong in ({}, {"X-CSRF-Token": ""}, {"X-CSRF-Token": other.headers["X-CSRF-Token"]}):
        for method, path, body in (
            ("POST", "/v1/disks", DISK), ("DELETE", "/v1/session", None),
            ("PATCH", "/v1/accounts/ann", {}), ("PUT", "/v1/images/x/pin", None),
        ):  # fmt: skip
            answer = ann(method, path, body, headers=wrong)
            problem(answer, 403, "csrf-token-wrong")
    assert ann("GET", "/v1/session").json["csrf_token"] == token


def test_pages_of_other_sites_change_nothing(world: Stranger) -> None:
    """What a browser says comes from elsewhere is refused, even with the right token; so is a log-in."""
    ann = log_in(world, "ann")
    for foreign in (
        {"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ):  # fmt: skip
        problem(ann("POST", "/v1/disks", DISK, headers=foreign), 403, "origin-foreign")
        wanted = {"name": "ann", "password": PASSWORD}
        problem(world("POST", "/v1/session", wanted, headers=foreign), 403, "origin-foreign")
    own = {"Origin": "https://falconframework.org", "Sec-Fetch-Site": "same-origin"}
    assert ann("POST", "/v1/accounts", {"name": "b"}, headers=own).status_code == 201


def test_only_tokens_are_taken_in_the_header(world: Stranger) -> None:
    """Passwords in `Authorization` are not taken, nor anything else; the answer says what is."""
    for header in (
        "Basic YW5uOmhvcnNl",
        "Bearer",
        "Bearer ",
        "Bearer sct_",
        "bearer x.y.z",
        "sct_",
    ):
        answer = world("GET", "/v1", headers={"Authorization": header})
        problem(answer, 401, "not-authenticated")
        assert answer.headers["www-authenticate"] == "Bearer"
    problem(world("GET", "/no/such/route"), 401, "not-authenticated")
    assert world("GET", "/healthz").status_code == 200


def test_wrong_passwords_are_rationed_by_name(api: Api, world: Stranger) -> None:
    """After so many wrong passwords a name has to wait, from every address; others do not. A right
    password before that forgives."""
    for attempt in range(WRONG_PER_NAME - 1):
        assert reserve_attempt(api.db, "ann", f"198.51.100.{attempt}") == 0
    assert log_in(world, "ann")
    for attempt in range(WRONG_PER_NAME):
        assert reserve_attempt(api.db, "ann", f"198.51.100.{attempt}") == 0

    answer = world("POST", "/v1/session", {"name": "ann", "password": PASSWORD})

    problem(answer, 429, "login-rationed")
    assert 1 <= int(answer.headers["retry-after"]) <= 300
    problem(world("POST", "/v1/session", {"name": "bob", "password": PASSWORD}), 401, "login-wrong")
    api.db.connection.execute("UPDATE login_failures SET at = at - 301")
    assert log_in(world, "ann")


def test_wrong_passwords_are_rationed_by_address(api: Api, world: Stranger) -> None:
    """After so many wrong passwords an address has to wait, whatever the names; of IPv6 it is the
    network that counts."""
    for attempt in range(WRONG_PER_ADDRESS):
        assert reserve_attempt(api.db, f"name{attempt}", f"2001:db8::{attempt + 1:x}") == 0

    near = Stranger(world.client, address="2001:db8::ffff:1")
    far = Stranger(world.client, address="2001:db8:1::1")

    wanted = {"name": "ann", "password": PASSWORD}
    problem(near("POST", "/v1/session", wanted), 429, "login-rationed")
    assert far("POST", "/v1/session", wanted).status_code == 201


def test_unknown_names_take_as_long(world: Stranger) -> None:
    """How long the answer takes does not tell whether a name exists."""

    taken_s: dict[str, list[float]] = {"ann": [], "zoe": []}
    for _ in range(5):  # in turns: other work of this machine then slows both
        for name, found in taken_s.items():
            begin = time.process_time()
            answer = world("POST", "/v1/session", {"name": name, "password": "wrong"})
            found.append(time.process_time() - begin)
            problem(answer, 401, "login-wrong")

    assert 1 / 3 < min(taken_s["ann"]) / min(taken_s["zoe"]) < 3
