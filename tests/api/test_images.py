"""`/v1/images`: statuses and bodies."""

import pytest
from support.api_daemon import (
    IMAGE_BYTES,
    IMAGE_ID,
    Api,
    Requests,
    insert_disk,
    insert_image,
    problem,
    standing_in,
)
from support.lineage import add_disk, add_snapshot

from stratocache.cache.catalogue import Standing
from stratocache.fs import inventory, withdrawal

pytestmark = pytest.mark.root  # callers are root, or are made from root


def test_fetch_is_accepted_with_an_operation(root: Requests) -> None:
    """POST /v1/images answers 202 at once, with the operation and its address."""
    answer = root("POST", "/v1/images", {"reference": IMAGE_ID, "pin": True})

    assert answer.status_code == 202
    assert answer.json["kind"] == "fetch"
    assert answer.json["state"] == "pending"
    assert answer.json["request"] == {"reference": IMAGE_ID, "pin": True}
    assert answer.headers["location"] == f"/v1/operations/{answer.json['id']}"
    assert root("GET", answer.headers["location"]).json["id"] == answer.json["id"]


def test_fetch_that_ends_within_wait_answers_the_image(api: Api, root: Requests) -> None:
    """With ?wait= a fetch that is done in time answers 201 and the image."""
    with standing_in(api.db):
        answer = root("POST", "/v1/images", {"reference": IMAGE_ID}, params={"wait": 30})

    assert answer.status_code == 201
    assert answer.json["id"] == IMAGE_ID
    assert answer.json["entry"]["title"] == "a small system"
    assert answer.headers["location"] == f"/v1/images/{IMAGE_ID}"


def test_images_are_listed_and_shown(api: Api, root: Requests) -> None:
    """GET lists images by state and shows one; an unknown one is 404."""
    insert_image(api.db)

    listed = root("GET", "/v1/images").json
    assert [image["id"] for image in listed["images"]] == [IMAGE_ID]
    assert listed["next"] is None
    assert root("GET", "/v1/images", params={"state": "fetching"}).json["images"] == []
    assert root("GET", f"/v1/images/{IMAGE_ID}").json["size_bytes"] == IMAGE_BYTES
    problem(root("GET", "/v1/images/A"), 404, "image-unknown")


def test_image_is_pinned_and_unpinned(api: Api, root: Requests) -> None:
    """PUT and DELETE on pin change the image, twice without error, and bar its deletion."""
    insert_image(api.db)
    pin = f"/v1/images/{IMAGE_ID}/pin"

    assert root("PUT", pin).json["pinned"] is True
    assert root("PUT", pin).json["pinned"] is True
    problem(root("DELETE", f"/v1/images/{IMAGE_ID}"), 409, "image-pinned")
    assert root("DELETE", pin).json["pinned"] is False
    problem(root("PUT", "/v1/images/A/pin"), 404, "image-unknown")


def test_image_is_deleted(api: Api, root: Requests) -> None:
    """DELETE answers 204 when the image is gone."""
    insert_image(api.db)
    with standing_in(api.db):
        assert root("DELETE", f"/v1/images/{IMAGE_ID}").status_code == 204

    problem(root("GET", f"/v1/images/{IMAGE_ID}"), 404, "image-unknown")


def test_ordinary_users_may_not_delete_or_pin_images(api: Api, nobody: Requests) -> None:
    """Images belong to the host: 403 for those who are not administrators."""
    insert_image(api.db)

    problem(nobody("DELETE", f"/v1/images/{IMAGE_ID}"), 403, "not-allowed")
    problem(nobody("PUT", f"/v1/images/{IMAGE_ID}/pin"), 403, "not-allowed")


def test_an_image_is_shown_with_its_cost_and_its_disks(api: Api, root: Requests) -> None:
    """GET of one image says what fetching moved, when it is complete, and what was made of it."""
    insert_image(api.db)
    uuid = insert_disk(api.db)
    api.db.connection.execute("UPDATE disks SET base_image = ?", (IMAGE_ID,))
    api.db.connection.execute("UPDATE images SET state = 'provisional', verified_at = NULL")
    tag = root("GET", f"/v1/images/{IMAGE_ID}").headers["etag"]
    api.db.connection.execute(
        "INSERT INTO image_traffic (image_id, remote_bytes, remote_wait_s, dedup_bytes, local_bytes, "
        "rate_bytes_s, updated_at) VALUES (?, 1000, 1.5, 500, ?, 1048576, '')",
        (IMAGE_ID, IMAGE_BYTES - 2 * 1048576),
    )
    api.db.connection.execute(
        "INSERT INTO disk_traffic (disk_number, remote_bytes, remote_wait_s, updated_at) "
        "VALUES (1, 700, 0.25, '')"
    )

    answer = root("GET", f"/v1/images/{IMAGE_ID}")
    disk = root("GET", f"/v1/disks/{uuid}").json

    shown = answer.json
    assert answer.headers["etag"] != tag  # there is something new to see
    assert (
        answer.headers["etag"].partition("-")[0] == tag.partition("-")[0]
    )  # nothing to decide anew
    assert (shown["remote_bytes"], shown["remote_wait_s"], shown["dedup_bytes"]) == (1000, 1.5, 500)
    assert (shown["local_bytes"], shown["complete_in_s"]) == (IMAGE_BYTES - 2 * 1048576, 2.0)
    assert [(item["uuid"], item["snapshots"]) for item in shown["disks"]] == [(uuid, [])]
    assert (disk["remote_bytes"], disk["remote_wait_s"], disk["fenced"]) == (700, 0.25, False)


def test_an_image_is_shown_with_its_lineage(api: Api, root: Requests, nobody: Requests) -> None:
    """Disks have their snapshots, snapshots their clones; others see what is theirs or public."""
    insert_image(api.db)
    disk = add_disk(api.db, tag="first")
    snapshot = add_snapshot(api.db, disk, tag="before")
    clone = add_disk(api.db, of=snapshot, public=True)
    attachment = {"instance": "vm-1", "access": "ro"}
    with standing_in(api.db):
        assert root("POST", f"/v1/disks/{clone}/attachments", attachment).status_code == 201

    shown = root("GET", f"/v1/images/{IMAGE_ID}").json
    [top] = shown["disks"]
    assert (top["uuid"], top["tag"], top["attached_to"]) == (disk, "first", [])
    [below] = top["snapshots"]
    assert (below["id"], below["tag"]) == (snapshot, "before")
    assert [(item["uuid"], item["attached_to"]) for item in below["disks"]] == [(clone, ["vm-1"])]
    assert (shown["disk_count"], shown["snapshot_count"], shown["omitted_count"]) == (2, 1, 0)
    seen = nobody("GET", f"/v1/images/{IMAGE_ID}").json
    assert [item["uuid"] for item in seen["disks"]] == [clone]
    assert (seen["disk_count"], seen["snapshot_count"]) == (1, 0)


def test_a_withdrawn_image_says_why(api: Api, root: Requests) -> None:
    """State, time and reason are in the lists and the details, and change the entity tag."""
    insert_image(api.db)
    tag = root("GET", f"/v1/images/{IMAGE_ID}").headers["etag"]
    image = inventory.image(api.db, IMAGE_ID)
    reason = "The endorser found a hole."
    withdrawal.record(api.db, image, Standing("taken-back", reason=reason), confirm_s=0)

    [listed] = root("GET", "/v1/images", params={"state": "withdrawn"}).json["images"]
    shown = root("GET", f"/v1/images/{IMAGE_ID}")

    assert listed["withdrawn_because"] == reason
    assert shown.json["withdrawn_at"] == listed["withdrawn_at"]
    assert shown.json["checked_at"] is not None
    assert shown.headers["etag"] != tag


def test_disks_of_a_rejected_image_are_fenced(api: Api, root: Requests) -> None:
    """A disk that began as a rejected image cannot be attached: 403, and it is shown."""
    insert_image(api.db)
    uuid = insert_disk(api.db)
    api.db.connection.execute("UPDATE disks SET base_image = ?", (IMAGE_ID,))
    api.db.connection.execute("UPDATE images SET state = 'rejected'")

    answer = root("POST", f"/v1/disks/{uuid}/attachments", {"instance": "vm"})

    problem(answer, 403, "disk-fenced")
    assert root("GET", f"/v1/disks/{uuid}").json["fenced"] is True
    assert root("GET", "/v1/images").json["images"][0]["state"] == "rejected"


def test_boot_sets_are_exported_and_imported(api: Api, root: Requests) -> None:
    """PUT takes a boot set that fits the image, GET gives it back; anything else is refused."""
    insert_image(api.db)
    path = f"/v1/images/{IMAGE_ID}/bootset"
    good = {"version": 1, "chunk_bytes": 524288, "size_bytes": IMAGE_BYTES, "indexes": [3, 0]}

    problem(root("GET", path), 404, "bootset-unknown")
    assert root("PUT", path, good).status_code == 204
    assert root("GET", path).json == good
    for bad in (
        {**good, "version": 2}, {**good, "size_bytes": 1}, {**good, "indexes": [10**6]},
        {**good, "indexes": [True]}, {**good, "indexes": "0"}, {**good, "indexes": [0] * 5000},
    ):  # fmt: skip
        problem(root("PUT", path, bad), 422, "bootset-invalid")
    assert root("GET", path).json == good
