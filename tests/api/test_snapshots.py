"""Snapshots, growth, hydration, saving and quarantine through the API, on rows alone."""

from collections.abc import Iterator

import pytest
from support.api_daemon import ROOT, Api, Requests, insert_disk, perform, problem, standing_in

from stratocache.fs import attachment_intents, snapshot_intents


@pytest.fixture
def daemon(api: Api) -> Iterator[None]:
    """Somebody who ends operations."""
    with standing_in(api.db):
        yield


def _snapshot(api: Api, uuid: str) -> str:
    operation = snapshot_intents.create_snapshot(api.db, ROOT, uuid)
    perform(api.db, operation)
    return operation.subject


@pytest.mark.usefixtures("daemon")
def test_snapshot_is_made_shown_and_deleted(api: Api, root: Requests) -> None:
    """POST answers 201 with the snapshot's address, GET shows and lists it, DELETE removes it."""
    path = f"/v1/disks/{insert_disk(api.db)}/snapshots"
    made = root("POST", path, {"tag": "before"})
    assert made.status_code == 201, made.text
    address = made.headers["location"]
    assert address == f"{path}/{made.json['id']}"
    assert made.json["tag"] == "before"
    assert root("GET", address).json == made.json
    assert root("GET", path).json["snapshots"] == [made.json]
    assert root("GET", path, params={"tag": "other"}).json["snapshots"] == []

    assert root("DELETE", address).status_code == 204
    problem(root("GET", address), 404, "snapshot-unknown")


@pytest.mark.usefixtures("daemon")
def test_rollback_answers_when_it_is_done(api: Api, root: Requests) -> None:
    """A rollback is 204; of an attached disk it is 409 naming the holder."""
    uuid = insert_disk(api.db)
    address = f"/v1/disks/{uuid}/snapshots/{_snapshot(api, uuid)}"
    assert root("POST", f"{address}/rollback").status_code == 204
    perform(api.db, attachment_intents.attach(api.db, ROOT, uuid, instance="vm7"))

    refused = problem(root("POST", f"{address}/rollback"), 409, "disk-attached")
    assert "vm7" in refused["detail"]


@pytest.mark.usefixtures("daemon")
def test_snapshot_of_another_disk_is_unknown(api: Api, root: Requests) -> None:
    """A snapshot is found below its own disk only."""
    one, other = insert_disk(api.db), insert_disk(api.db)
    address = f"/v1/disks/{other}/snapshots/{_snapshot(api, one)}"

    for method in ("GET", "DELETE"):
        problem(root(method, address), 404, "snapshot-unknown")
    problem(root("POST", address + "/rollback"), 404, "snapshot-unknown")


@pytest.mark.usefixtures("daemon")
def test_clone_of_a_snapshot(api: Api, root: Requests) -> None:
    """A disk is made of a snapshot, at least of its size, and not of an image at the same time."""
    uuid = insert_disk(api.db)
    body = {"snapshot": _snapshot(api, uuid)}
    made = root("POST", "/v1/disks", body)
    assert made.status_code == 201, made.text
    assert (made.json["base_snapshot"], made.json["size_bytes"]) == (body["snapshot"], 2**20)

    small = root("POST", "/v1/disks", {**body, "size_bytes": 2**20 - 512})
    problem(small, 400, "field-invalid", "size_bytes")
    both = root("POST", "/v1/disks", {**body, "reference": "x"})
    problem(both, 400, "origin-ambiguous", "snapshot")
    nothing = {"snapshot": "00000000-0000-4000-8000-000000000000"}
    problem(root("POST", "/v1/disks", nothing), 404, "snapshot-unknown")


@pytest.mark.usefixtures("daemon")
def test_disk_grows_by_patch(api: Api, root: Requests) -> None:
    """PATCH of the size answers with the grown disk; a smaller one is 400 and changes nothing."""
    path = f"/v1/disks/{insert_disk(api.db)}"
    grown = root("PATCH", path, {"size_bytes": 2**21, "tag": "large"})
    assert grown.status_code == 200, grown.text
    assert (grown.json["size_bytes"], grown.json["tag"]) == (2**21, "large")

    shrunk = root("PATCH", path, {"size_bytes": 2**20, "tag": "small"})
    problem(shrunk, 400, "size-shrinks", "size_bytes")
    assert root("GET", path).json["tag"] == "large"
    assert root("PATCH", path, {"size_bytes": 2**21}).status_code == 200


@pytest.mark.usefixtures("daemon")
def test_disk_with_snapshots_is_deleted_on_request_only(api: Api, root: Requests) -> None:
    """DELETE of a disk with snapshots is 409 naming them, with ?snapshots=delete 204."""
    uuid = insert_disk(api.db)
    kept = _snapshot(api, uuid)
    path = f"/v1/disks/{uuid}"

    assert kept in problem(root("DELETE", path), 409, "disk-has-snapshots")["detail"]
    wrong = root("DELETE", path, params={"snapshots": "keep"})
    problem(wrong, 400, "parameter-invalid", "snapshots")
    assert root("DELETE", path, params={"snapshots": "delete"}).status_code == 204


@pytest.mark.usefixtures("daemon")
def test_hydrate_and_save_answer_with_operations(api: Api, root: Requests) -> None:
    """Both are 202 with an operation; saving passes on what the metadata is to say."""
    uuid = insert_disk(api.db)
    problem(root("POST", f"/v1/disks/{uuid}/hydrate"), 409, "disk-raw")
    api.db.connection.execute("UPDATE disks SET form = 'overlay'")
    hydration = root("POST", f"/v1/disks/{uuid}/hydrate", params={"wait": 10})
    assert (hydration.status_code, hydration.json["kind"]) == (202, "hydrate")
    assert hydration.json["state"] == "done"

    saving = root("POST", f"/v1/disks/{uuid}/save", {"title": "mine"}, params={"wait": 10})
    assert (saving.status_code, saving.json["kind"]) == (202, "save")
    assert saving.json["request"]["title"] == "mine"
    bad = root("POST", f"/v1/disks/{uuid}/save", {"valid_days": 0})
    problem(bad, 400, "field-invalid", "valid_days")


def test_failed_instance_leaves_its_disk_in_quarantine(api: Api, root: Requests) -> None:
    """?outcome=failed keeps the volatile disk until it is restored."""
    uuid = insert_disk(api.db, volatile=True)
    with standing_in(api.db):
        launch = {"reference": "GOaxJFdoEXvqAm9ArJgnZ0_ky6F", "instance": "vm1"}
        launched = root("POST", "/v1/launches", launch)
        assert launched.status_code == 201, launched.text
        boot = launched.json["boot"]["disk_uuid"]
        wrong = root("DELETE", "/v1/launches/vm1", params={"outcome": "odd"})
        problem(wrong, 400, "parameter-invalid", "outcome")
        ended = root("DELETE", "/v1/launches/vm1", params={"outcome": "failed"})
        assert ended.status_code == 204
    disk = root("GET", f"/v1/disks/{boot}").json
    assert disk["quarantined_at"] is not None
    attach = root("POST", f"/v1/disks/{boot}/attachments", {"instance": "vm2"})
    problem(attach, 409, "disk-quarantined")

    restored = root("POST", f"/v1/disks/{boot}/restore").json
    assert (restored["quarantined_at"], restored["volatile"]) == (None, False)
    problem(root("POST", f"/v1/disks/{uuid}/restore"), 409, "disk-not-quarantined")


def test_own_snapshots_only(api: Api, root: Requests, nobody: Requests) -> None:
    """A private disk's snapshots do not exist for others; a public one's cannot be changed."""
    private, public = insert_disk(api.db), insert_disk(api.db, visibility="public")
    kept = _snapshot(api, public)

    problem(nobody("GET", f"/v1/disks/{private}/snapshots"), 404, "disk-unknown")
    problem(nobody("POST", f"/v1/disks/{private}/snapshots", {}), 404, "disk-unknown")
    path = f"/v1/disks/{public}/snapshots"
    assert [item["id"] for item in nobody("GET", path).json["snapshots"]] == [kept]
    problem(nobody("POST", path, {}), 403, "disk-not-yours")
    problem(nobody("DELETE", f"{path}/{kept}"), 403, "disk-not-yours")
    problem(nobody("PATCH", f"/v1/disks/{public}", {"size_bytes": 2**21}), 403, "disk-not-yours")
    problem(nobody("POST", f"/v1/disks/{public}/hydrate"), 403, "disk-not-yours")
    problem(nobody("POST", f"/v1/disks/{public}/save", {}), 403, "disk-not-yours")
    problem(nobody("POST", f"/v1/disks/{public}/restore"), 403, "disk-not-yours")
    made = nobody("POST", "/v1/disks", {"snapshot": kept}, params={"wait": 0})
    assert made.status_code == 202
