"""`/v1/disks`: statuses, limits, paging, entity tags."""

from typing import Any

import pytest
from support.api_daemon import (
    ROOT,
    Api,
    Requests,
    insert_disk,
    perform,
    problem,
    standing_in,
)

from stratocache.fs import disk_intents, inventory

pytestmark = pytest.mark.root  # callers are root, or are made from root


def test_disk_is_created_shown_changed_and_deleted(api: Api, root: Requests) -> None:
    """The life of a blank disk: 201, 200, 200 after PATCH, 204."""
    body = {"size_bytes": 1024**3, "tag": "my disk", "visibility": "public", "kind": "data"}
    with standing_in(api.db):
        made = root("POST", "/v1/disks", body)
        path = made.headers["location"]

        assert made.status_code == 201
        assert path == f"/v1/disks/{made.json['uuid']}"
        assert made.json["size_bytes"] == 1024**3
        assert made.json["owner"] == "root"
        assert made.json["state"] == "available"
        assert root("GET", path).json == made.json
        changed = root("PATCH", path, {"tag": "other", "visibility": "private", "owner": "anna"})
        assert changed.json == {
            **made.json, "tag": "other", "visibility": "private", "owner": "anna",
        }  # fmt: skip
        assert root("DELETE", path).status_code == 204
        problem(root("GET", path), 404, "disk-unknown")


def test_disk_creation_without_waiting_is_accepted(root: Requests) -> None:
    """?wait=0 answers 202 and an operation whose subject is the disk's UUID."""
    answer = root("POST", "/v1/disks", {"size_bytes": 2**20}, params={"wait": 0})

    assert answer.status_code == 202
    assert answer.json["kind"] == "create-disk"
    assert root("GET", f"/v1/disks/{answer.json['subject']}").json["state"] == "creating"


@pytest.mark.parametrize(
    ("body", "code", "field"),
    [
        ({}, "size-missing", "size_bytes"),
        ({"size_bytes": 2**20 - 512}, "field-invalid", "size_bytes"),
        ({"size_bytes": 2**46 + 512}, "field-invalid", "size_bytes"),
        ({"size_bytes": 2**20 + 1}, "field-invalid", "size_bytes"),
        ({"size_bytes": "1048576"}, "field-invalid", "size_bytes"),
        ({"size_bytes": 1048576.5}, "field-invalid", "size_bytes"),
        ({"size_bytes": True}, "field-invalid", "size_bytes"),
        ({"size_bytes": 2**20, "tag": "x" * 41}, "field-invalid", "tag"),
        ({"size_bytes": 2**20, "tag": "a\nb"}, "field-invalid", "tag"),
        ({"size_bytes": 2**20, "visibility": "secret"}, "field-invalid", "visibility"),
        ({"size_bytes": 2**20, "kind": "floppy"}, "field-invalid", "kind"),
        ({"size_bytes": 2**20, "volatile": 1}, "field-invalid", "volatile"),
        ({"size_bytes": 2**20, "colour": "red"}, "field-unknown", "colour"),
        ({"reference": "a b"}, "field-invalid", "reference"),
        ({"reference": ""}, "field-invalid", "reference"),
        ({"reference": "x" * 4097}, "field-invalid", "reference"),
        ([], "body-invalid", None),
        ("text", "body-invalid", None),
    ],
)
def test_bad_disk_request_is_refused_and_leaves_nothing(
    api: Api, root: Requests, body: Any, code: str, field: str | None
) -> None:
    """Each fault of a body gets its code and the field's name; no row is written."""
    problem(root("POST", "/v1/disks", body), 400, code, field)

    assert inventory.disks(api.db, ROOT) == []
    assert inventory.operations(api.db) == []


def test_body_that_is_not_json_is_refused(root: Requests) -> None:
    """Broken JSON is 400, another media type 415, a body beyond the limit 413."""
    headers = {"Content-Type": "application/json"}

    problem(root("POST", "/v1/disks", body=None, headers=headers), 400, "body-invalid")
    for broken in (b"{", b"\xff{}", b'{"size_bytes": NaN}'):
        answer = root.client.simulate_post(
            "/v1/disks",
            body=broken,
            headers=headers,
            extras={"gunicorn.socket": root.connection},
        )
        assert answer.status_code == 400
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    problem(root("POST", "/v1/disks", headers=form), 415, "body-not-json")
    problem(root("POST", "/v1/disks", {"tag": "x" * 1024**2}), 413, "body-too-large")


def test_unknown_and_bad_parameters_are_refused(root: Requests) -> None:
    """A query parameter that is unknown or out of range is 400 naming it."""
    problem(root("GET", "/v1/disks", params={"colour": "red"}), 400, "parameter-unknown", "colour")
    for wait in ("-1", "601", "soon", "nan", "inf"):
        answer = root("POST", "/v1/disks", {"size_bytes": 2**20}, params={"wait": wait})
        problem(answer, 400, "parameter-invalid", "wait")
    for limit in ("0", "1001", "-1", "x", "9" * 30):
        answer = root("GET", "/v1/disks", params={"limit": limit})
        problem(answer, 400, "parameter-invalid", "limit")


def test_lists_are_paged_and_filtered(api: Api, root: Requests) -> None:
    """?limit= and ?after= walk through all items once, though one vanishes on the way."""
    made = [insert_disk(api.db, tag="odd" if number % 2 else "even") for number in range(7)]

    first = root("GET", "/v1/disks", params={"limit": 3}).json
    perform(api.db, disk_intents.delete_disk(api.db, ROOT, made[2]))
    second = root("GET", "/v1/disks", params={"limit": 3, "after": first["next"]}).json
    third = root("GET", "/v1/disks", params={"limit": 3, "after": second["next"]}).json

    seen = [disk["uuid"] for page in (first, second, third) for disk in page["disks"]]
    assert seen == made
    assert third["next"] is None
    odd = root("GET", "/v1/disks", params={"tag": "odd"}).json["disks"]
    assert [disk["uuid"] for disk in odd] == made[1::2]


def test_private_disks_of_others_do_not_exist(api: Api, root: Requests, nobody: Requests) -> None:
    """An ordinary user sees their own and public disks, and may not change those of others."""
    private, public = insert_disk(api.db), insert_disk(api.db, visibility="public")

    listed = nobody("GET", "/v1/disks").json["disks"]
    assert [disk["uuid"] for disk in listed] == [public]
    problem(nobody("GET", f"/v1/disks/{private}"), 404, "disk-unknown")
    problem(nobody("DELETE", f"/v1/disks/{private}"), 404, "disk-unknown")
    problem(nobody("PATCH", f"/v1/disks/{public}", {"tag": "mine"}), 403, "disk-not-yours")
    problem(nobody("DELETE", f"/v1/disks/{public}"), 403, "disk-not-yours")


def test_if_match_guards_changes(api: Api, root: Requests) -> None:
    """A change under an entity tag that is no longer the present one is 412 and changes nothing."""
    path = f"/v1/disks/{insert_disk(api.db)}"
    tag = root("GET", path).headers["etag"]

    first = root("PATCH", path, {"tag": "one"}, headers={"If-Match": tag})
    assert first.status_code == 200
    assert first.headers["etag"] != tag
    stale = {"If-Match": tag}
    problem(root("PATCH", path, {"tag": "two"}, headers=stale), 412, "etag-mismatch")
    problem(root("DELETE", path, headers=stale), 412, "etag-mismatch")
    weak = {"If-Match": f"W/{first.headers['etag']}"}
    problem(root("PATCH", path, {"tag": "two"}, headers=weak), 412, "etag-mismatch")
    assert root("GET", path).json["tag"] == "one"
    assert root("PATCH", path, {"tag": "two"}, headers={"If-Match": "*"}).json["tag"] == "two"
