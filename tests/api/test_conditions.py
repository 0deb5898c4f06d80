"""`If-None-Match` and `If-Match`: nobody is sent what they have, nobody overwrites the unseen."""

import threading
from typing import Any

import pytest
from support.api_daemon import (
    IMAGE_ID,
    Api,
    Requests,
    insert_disk,
    insert_image,
    perform,
    problem,
    standing_in,
)

from stratocache.api.problem import HttpProblem
from stratocache.fs import disk_intents, inventory, snapshot_intents
from stratocache.fs.records import Caller

pytestmark = pytest.mark.root

ADMIN = Caller("root", "admin")
STALE = {"If-Match": '"' + "0" * 32 + '"'}


def launched(api: Api, root: Requests) -> dict[str, str]:
    """Make one of everything that can be changed; return the addresses."""
    insert_image(api.db)
    uuid = insert_disk(api.db)
    snapshot = snapshot_intents.create_snapshot(api.db, ADMIN, uuid)
    perform(api.db, snapshot)
    with standing_in(api.db):
        attached = root("POST", f"/v1/disks/{uuid}/attachments", {"instance": "vm", "lease_s": 60})
        body = {"reference": IMAGE_ID, "instance": "vm-1", "lease_s": 60}
        assert root("POST", "/v1/launches", body).status_code == 201
    return {
        "disk": f"/v1/disks/{uuid}",
        "image": f"/v1/images/{IMAGE_ID}",
        "snapshot": f"/v1/disks/{uuid}/snapshots/{snapshot.subject}",
        "attachment": attached.headers["location"],
        "launch": "/v1/launches/vm-1",
        "operation": f"/v1/operations/{snapshot.id}",
    }


def test_nobody_is_sent_what_they_have(api: Api, root: Requests) -> None:
    """Every GET of JSON has an entity tag, and answers 304 to who sends it, with HEAD's length."""
    paths = [*launched(api, root).values()]
    paths += [f"/v1/{name}" for name in ("disks", "images", "launches", "attachments", "events")]
    for path in (*paths, "/v1", "/openapi.json", "/v1/operations"):
        first = root("GET", path)
        tag = first.headers["etag"]
        assert first.status_code == 200, path
        for known in (tag, f'"other", {tag}', "W/" + tag, "*"):
            again = root("GET", path, headers={"If-None-Match": known})
            assert (again.status_code, again.content) == (304, b""), (path, known)
            assert again.headers["etag"] == tag
        assert root("GET", path, headers={"If-None-Match": '"other"'}).json == first.json


def test_what_is_new_is_sent(api: Api, root: Requests) -> None:
    """A tag is good until anything that is shown changes, also what no If-Match needs to know."""
    path = f"/v1/disks/{insert_disk(api.db)}"
    tag = root("GET", path).headers["etag"]
    api.db.connection.execute(
        "INSERT INTO disk_traffic (disk_number, remote_bytes, remote_wait_s, updated_at) "
        "VALUES (1, 700, 0.25, '')"
    )

    answer = root("GET", path, headers={"If-None-Match": tag})
    assert (answer.status_code, answer.json["remote_bytes"]) == (200, 700)
    changed = root("PATCH", path, {"tag": "x"}, headers={"If-Match": tag})
    assert changed.status_code == 200


CHANGES: list[tuple[str, str, str, Any]] = [
    ("PATCH", "disk", "", {"tag": "x"}),
    ("DELETE", "disk", "", None),
    ("DELETE", "image", "", None),
    ("PUT", "image", "/pin", None),
    ("DELETE", "image", "/pin", None),
    ("DELETE", "snapshot", "", None),
    ("PUT", "attachment", "/lease", {"lease_s": 120}),
    ("DELETE", "attachment", "", None),
    ("PUT", "launch", "/lease", {"lease_s": 120}),
    ("DELETE", "launch", "", None),
]


def test_stale_changes_change_nothing(api: Api, root: Requests) -> None:
    """Everything that can be changed refuses a change of a state that is not the present one."""
    paths = launched(api, root)
    before = {name: root("GET", path).json for name, path in paths.items()}
    for method, name, suffix, body in CHANGES:
        answer = root(method, paths[name] + suffix, body, headers=STALE)
        problem(answer, 412, "etag-mismatch")

    assert {name: root("GET", path).json for name, path in paths.items()} == before
    for method, name, suffix, body in CHANGES[3:8]:
        tag = root("GET", paths[name]).headers["etag"]
        with standing_in(api.db):
            done = root(method, paths[name] + suffix, body, headers={"If-Match": tag})
        assert done.status_code in (200, 204), (method, name, done.text)


def test_of_changes_at_the_same_time_one_wins(api: Api) -> None:
    """Of eight who change a disk that all have seen, one does; the state is judged in the
    transaction that changes it."""
    uuid = insert_disk(api.db)
    path, start, statuses = f"/v1/disks/{uuid}", threading.Barrier(8), []

    def change(number: int) -> None:
        with api.caller() as requests:
            tag = requests("GET", path).headers["etag"]
            start.wait(30)
            body = {"tag": f"by {number}"}
            answer = requests("PATCH", path, body, headers={"If-Match": tag})
            statuses.append(answer.status_code)

    threads = [threading.Thread(target=change, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert sorted(statuses) == [200] + [412] * 7


def test_a_condition_is_for_one_transaction(api: Api) -> None:
    """What a block expects is judged once, within its first transaction, and never after it."""
    uuid = insert_disk(api.db)

    def refuse() -> None:
        raise HttpProblem(412, "etag-mismatch", "No.")

    with pytest.raises(HttpProblem), api.db.expecting(refuse):
        disk_intents.update_disk(api.db, ADMIN, uuid, tag="never")
    with api.db.expecting(refuse):
        assert inventory.disk(api.db, ADMIN, uuid).tag == ""
    disk_intents.update_disk(api.db, ADMIN, uuid, tag="later")

    assert inventory.disk(api.db, ADMIN, uuid).tag == "later"
