"""`/v1/disks/{uuid}/shares`: what named users may do with another's disk."""

from typing import Any

import pytest
from support.api_daemon import (
    Api,
    Requests,
    insert_disk,
    perform,
    problem,
    standing_in,
)

from stratocache.fs import accounts, disk_intents, inventory, snapshot_intents
from stratocache.fs.accounts import AccountRequest
from stratocache.fs.records import Caller

pytestmark = pytest.mark.root

ADMIN, OWNER = Caller("root", "admin", of_host=True), Caller("anna", "user")
MIB = 2**20


def world(api: Api) -> tuple[str, str]:
    """Make a private disk of somebody with a snapshot and files; return its path and the snapshot."""
    uuid = insert_disk(api.db, OWNER)
    taken = snapshot_intents.create_snapshot(api.db, OWNER, uuid)
    perform(api.db, taken)
    directory = api.configuration.state_dir / "disks" / uuid
    directory.mkdir(parents=True)
    (directory / "data").write_bytes(bytes(MIB))
    return f"/v1/disks/{uuid}", taken.subject


def reach(requests: Requests, path: str, snapshot: str) -> dict[str, int]:
    """Try everything that rights decide; return the statuses. What was made is undone."""
    statuses = {"see": requests("GET", path).status_code}
    listed = requests("GET", "/v1/disks").json["disks"]
    assert (path.rpartition("/")[2] in {disk["uuid"] for disk in listed}) == (
        statuses["see"] == 200
    )

    def attach(access: str) -> int:
        body = {"instance": "vm", "access": access}
        made = requests("POST", path + "/attachments", body)
        if made.status_code == 201:
            assert requests("DELETE", made.headers["location"]).status_code == 204
        return made.status_code

    statuses["download"] = requests("GET", path + "/content").status_code
    clone = requests("POST", "/v1/disks", {"snapshot": snapshot})
    if clone.status_code == 201:
        assert requests("DELETE", clone.headers["location"]).status_code == 204
    statuses["clone"] = clone.status_code
    statuses["attach ro"] = attach("ro")
    statuses["attach rw"] = attach("rw")
    statuses["upload"] = requests.client.simulate_put(
        path + "/content", body=bytes(MIB), headers={"Content-Type": "application/octet-stream"},
        extras={"gunicorn.socket": requests.connection},
    ).status_code  # fmt: skip
    statuses["snapshot"] = requests("POST", path + "/snapshots", {}).status_code
    statuses["change"] = requests("PATCH", path, {"tag": "x"}).status_code
    statuses["share"] = requests("PUT", path + "/shares/eve", {"access": "read"}).status_code
    statuses["roll back"] = requests(
        "POST", f"{path}/snapshots/{snapshot}/rollback"
    ).status_code  # fmt: skip
    statuses["delete"] = requests("DELETE", path).status_code
    return statuses


ALL_REFUSED = dict.fromkeys(
    ("see", "download", "attach ro", "attach rw", "upload", "snapshot", "change", "share",
     "roll back", "delete"), 404,
)  # fmt: skip
OWNERS_ALONE = {"change": 403, "share": 403, "roll back": 403, "delete": 403}
WRITING = {"attach rw": 403, "upload": 403, "snapshot": 403}
READING = {"see": 200, "download": 200, "clone": 201, "attach ro": 201}


def test_a_share_gives_what_it_says_and_no_more(api: Api, root: Requests, nobody: Requests) -> None:
    """Unshared a private disk is not there; read lets one see, download, clone and attach read-only,
    write also attach, upload and take snapshots; the rest is the owner's. An end of it ends all."""
    path, snapshot = world(api)
    with standing_in(api.db):
        before = reach(nobody, path, snapshot)
        assert root("PUT", path + "/shares/nobody", {"access": "read"}).status_code == 201
        reading = reach(nobody, path, snapshot)
        assert root("PUT", path + "/shares/nobody", {"access": "write"}).status_code == 200
        writing = reach(nobody, path, snapshot)
        assert root("DELETE", path + "/shares/nobody").status_code == 204
        after = reach(nobody, path, snapshot)

    assert before == after == {**ALL_REFUSED, "clone": 404}
    assert reading == {**READING, **WRITING, **OWNERS_ALONE}
    assert writing == {
        **READING, "attach rw": 201, "upload": 200, "snapshot": 201, **OWNERS_ALONE
    }  # fmt: skip


def test_shares_are_listed_to_the_owner_and_each_to_itself(
    api: Api, root: Requests, nobody: Requests
) -> None:
    """Owners see all; who shares sees only that; both may end it, others may not."""
    path, _ = world(api)
    for user, access in (("nobody", "read"), ("eve", "write")):
        made = root("PUT", f"{path}/shares/{user}", {"access": access})
        assert made.headers["location"] == f"{path}/shares/{user}"
    listed = root("GET", path + "/shares", params={"sort": "user"}).json["shares"]

    assert [(item["user"], item["access"]) for item in listed] == [
        ("eve", "write"),
        ("nobody", "read"),
    ]
    assert [item["user"] for item in nobody("GET", path + "/shares").json["shares"]] == ["nobody"]
    problem(nobody("DELETE", path + "/shares/eve"), 403, "disk-not-yours")
    assert nobody("DELETE", path + "/shares/nobody").status_code == 204
    problem(nobody("GET", path + "/shares"), 404, "disk-unknown")
    problem(root("DELETE", path + "/shares/nobody"), 404, "share-unknown")
    kinds = [item["kind"] for item in root("GET", "/v1/events?kind=disk.").json["events"]]
    assert kinds == ["disk.shared", "disk.shared", "disk.unshared"]


@pytest.mark.parametrize(
    ("user", "body", "code", "field"),
    [
        ("anna", {"access": "read"}, "share-with-owner", "user"),
        ("-rf", {"access": "read"}, "parameter-invalid", "user"),
        ("x" * 65, {"access": "read"}, "parameter-invalid", "user"),
        ("eve", {"access": "own"}, "field-invalid", "access"),
        ("eve", {}, "field-missing", "access"),
    ],
)
def test_bad_shares_are_refused(
    api: Api, root: Requests, user: str, body: Any, code: str, field: str
) -> None:
    """A share with the owner, with no name, or of no access is refused, and is not there."""
    path, _ = world(api)

    problem(root("PUT", f"{path}/shares/{user}", body), 400, code, field)
    assert root("GET", path + "/shares").json == {"shares": [], "next": None}


def test_shares_go_with_what_they_are_of(api: Api, root: Requests, nobody: Requests) -> None:
    """A share ends with the disk, with the account that it is for, and when its user becomes the
    owner; the next account of the name has none."""
    path, _ = world(api)
    for user in ("bob", "nobody"):
        root("PUT", f"{path}/shares/{user}", {"access": "write"})
    accounts.create_account(api.db, ADMIN, AccountRequest("admin", "admin"))
    accounts.create_account(api.db, ADMIN, AccountRequest("bob"))
    accounts.delete_account(api.db, ADMIN, "bob")
    assert [item["user"] for item in root("GET", path + "/shares").json["shares"]] == ["nobody"]

    assert root("PATCH", path, {"owner": "nobody"}).status_code == 200
    assert root("GET", path + "/shares").json["shares"] == []
    assert root("PATCH", path, {"owner": "anna"}).status_code == 200
    problem(nobody("GET", path), 404, "disk-unknown")
    root("PUT", f"{path}/shares/nobody", {"access": "write"})
    uuid = path.rpartition("/")[2]
    perform(api.db, disk_intents.delete_disk(api.db, ADMIN, uuid, with_snapshots=True))
    assert api.db.rows("SELECT * FROM disk_shares") == []
    assert inventory.find_disk(api.db, uuid) is None
