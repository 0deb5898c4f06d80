"""The audit log: who changed what, who was refused, and that nobody changes it."""

import json
import sqlite3
from typing import Any

import pytest
from support.api_daemon import Api, Requests, insert_disk, insert_image, problem
from support.network_client import PASSWORD, Stranger, add_account, log_in, stranger

from stratocache.api import audit
from stratocache.fs.audit import prune
from stratocache.fs.records import Caller
from stratocache.fs.state import now

pytestmark = pytest.mark.root  # callers are root, or are made from root


@pytest.fixture
def world(api: Api) -> Stranger:
    """The accounts ann (admin) and ursula (user), and the network they come over."""
    add_account(api.db, "ann", "admin")
    add_account(api.db, "ursula")
    return stranger(api)


def lines(root: Requests, query: str = "") -> list[dict[str, Any]]:
    """Return the lines of the log."""
    found: list[dict[str, Any]] = root("GET", f"/v1/audit?limit=1000{query}").json["audit"]
    return found


def test_every_change_has_a_line(api: Api, root: Requests, world: Stranger) -> None:
    """Who, from where, what, of which object, with which end and operation; what only reads has none."""
    ursula = log_in(world, "ursula")
    made = ursula("POST", "/v1/disks?wait=0", {"size_bytes": 2**20})
    uuid = insert_disk(api.db, Caller("ursula", "user"))
    ursula("PATCH", f"/v1/disks/{uuid}", {"tag": "x"})
    ursula("DELETE", f"/v1/disks/{uuid}/snapshots/none")
    ursula("GET", "/v1/disks")
    root("POST", "/v1/accounts", {"name": "zoe"})

    found = [
        [line[name] for name in ("user", "address", "action", "subject", "outcome", "status")]
        for line in lines(root)
    ]

    far = "192.0.2.7"
    assert found == [
        ["ursula", far, "session.start", "ursula", "done", 201],
        ["ursula", far, "disk.create", "", "accepted", 202],
        ["ursula", far, "disk.change", uuid, "done", 200],
        ["ursula", far, "snapshot.delete", f"{uuid}/none", "failed", 404],
        ["root", "unix", "account.create", "zoe", "done", 201],
    ]
    assert lines(root)[1]["operation_id"] == made.json["id"]
    assert lines(root)[3]["message"].startswith("snapshot-unknown: ")


def test_every_refusal_has_a_line(api: Api, root: Requests, world: Stranger) -> None:
    """What one may not, with a GET too, and what strangers try, is there with its reason."""
    ursula = log_in(world, "ursula")
    insert_image(api.db)
    ursula("GET", "/v1/accounts")
    ursula("DELETE", "/v1/images/GOaxJFdoEXvqAm9ArJgnZ0_ky6F")
    del ursula.headers["X-CSRF-Token"]
    ursula("POST", "/v1/disks", {"size_bytes": 2**20})
    world("GET", "/v1/disks")
    world.with_token("sct_" + "x" * 43)("DELETE", "/v1/accounts/ann")
    world("POST", "/v1/session", {"name": "ann", "password": "wrong"})
    world("POST", "/v1/session", {"name": "my own password", "password": "ann"})

    found = [
        [line[name] for name in ("user", "action", "subject", "outcome", "status")]
        + [line["message"].partition(":")[0]]
        for line in lines(root)[1:]
    ]

    assert found == [
        ["ursula", "GET /v1/accounts", "", "refused", 403, "not-allowed"],
        ["ursula", "image.delete", "GOaxJFdoEXvqAm9ArJgnZ0_ky6F", "refused", 403, "not-allowed"],
        ["ursula", "disk.create", "", "refused", 403, "csrf-token-wrong"],
        [None, "GET /v1/disks", "", "refused", 401, "not-authenticated"],
        [None, "account.delete", "ann", "refused", 401, "not-authenticated"],
        [None, "session.start", "ann", "refused", 401, "login-wrong"],
        [None, "session.start", "", "refused", 401, "login-wrong"],
    ]


def test_no_secret_is_in_the_log(api: Api, root: Requests, world: Stranger) -> None:
    """Passwords, tokens and cookies are in no line, however they were sent."""
    ann = log_in(world, "ann")
    made = ann("POST", "/v1/accounts/ann/tokens", {"scopes": ["read"]}).json["token"]
    root("POST", "/v1/accounts", {"name": "b", "password": "another password"})
    root("POST", "/v1/accounts", {"name": "c", "password": "short one"})
    ann("PATCH", "/v1/accounts/ann", {"password": "a third password", "current_password": PASSWORD})
    unknown = "sct_" + "y" * 43
    world.with_token(unknown)("POST", "/v1/disks", {})
    world("GET", "/v1/disks", params={"token": unknown})
    world("POST", "/v1/session", {"name": PASSWORD, "password": PASSWORD})

    text = json.dumps(lines(root))

    for secret in (
        PASSWORD, made, "another password", "short one", "a third password", unknown,
        ann.headers["Cookie"].partition("=")[2], ann.headers["X-CSRF-Token"],
    ):  # fmt: skip
        assert secret not in text


def test_log_is_searched_and_exported(api: Api, root: Requests, world: Stranger) -> None:
    """Filters by user, beginning of the action, subject with what is below it, and time; pages, and
    all of it by the line."""
    uuid = insert_disk(api.db, Caller("ursula", "user"))
    ursula = log_in(world, "ursula")
    ursula("PATCH", f"/v1/disks/{uuid}", {"tag": "x"})
    ursula("DELETE", f"/v1/disks/{uuid}/snapshots/none")
    middle = now()
    root("PATCH", f"/v1/disks/{uuid}", {"tag": "y"})

    assert [line["user"] for line in lines(root, "&user=root")] == ["root"]
    assert len(lines(root, "&action=disk.")) == 2
    assert len(lines(root, f"&subject={uuid}")) == 3
    assert len(lines(root, f"&since={middle}")) == 1
    assert len(lines(root, f"&until={middle}&user=ursula")) == 3
    first = root("GET", "/v1/audit?limit=3").json
    rest = root("GET", f"/v1/audit?limit=3&after={first['next']}").json
    assert (len(first["audit"]), len(rest["audit"]), rest["next"]) == (3, 1, None)
    exported = root("GET", "/v1/audit", headers={"Accept": "application/x-ndjson"})
    assert exported.headers["content-type"] == "application/x-ndjson"
    assert [json.loads(line) for line in exported.text.splitlines()] == lines(root)
    for wrong in ("since=yesterday", "after=x", "until=9999-12-31T23:59:59-23:59", "what=1"):
        assert root("GET", f"/v1/audit?{wrong}").status_code == 400


def test_log_is_only_appended_to(api: Api, root: Requests, world: Stranger) -> None:
    """Neither this program's connection nor another changes or deletes a line; pruning takes old
    lines, is for administrators, and is in the log itself."""
    log_in(world, "ursula")
    (line,) = lines(root)
    with sqlite3.connect(api.db.path, timeout=20) as other:
        for statement in (
            "UPDATE audit SET user = 'nobody'", "DELETE FROM audit",
            "INSERT OR REPLACE INTO audit SELECT * FROM audit",
            f"UPDATE audit SET number = 7 WHERE number = {line['number']}",
        ):  # fmt: skip
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                other.execute("PRAGMA recursive_triggers = ON").execute(statement)
            other.rollback()
    other.close()
    assert lines(root) == [line]

    old = {"before": "2020-01-01T00:00:00Z"}
    assert root("POST", "/v1/audit/prune", old).json == {"deleted": 0}
    assert root("POST", "/v1/audit/prune", {"before": now()}).json == {"deleted": 2}
    (pruning,) = lines(root)
    assert (pruning["action"], pruning["user"]) == ("audit.prune", "root")
    assert pruning["subject"].startswith("before ")
    ursula = log_in(world, "ursula")
    problem(ursula("POST", "/v1/audit/prune", old), 403, "not-allowed")
    problem(root("POST", "/v1/audit/prune", {"before": "x"}), 400, "parameter-invalid", "before")
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        api.db.connection.execute("DELETE FROM audit")
    assert prune(api.db, Caller("root", "admin"), now()) == 4


def test_flood_of_strangers_is_counted(
    root: Requests, world: Stranger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of strangers only so many lines are written; the next line says how many were not."""
    monkeypatch.setattr(audit, "_STRANGERS_PER_S", 0)
    for number in range(130):
        far = Stranger(world.client, address=f"198.51.100.{number}")
        assert far("GET", "/v1").status_code == 401
    assert len(lines(root)) == 100

    monkeypatch.setattr(audit, "_STRANGERS_PER_S", 1000)
    far("GET", "/v1")

    last = lines(root)[-1]
    assert "(30 more were refused meanwhile.)" in last["message"]
