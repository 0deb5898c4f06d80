"""`/v1/overview`: everything that an overview shows, in one document."""

import pytest
from support.api_daemon import IMAGE_ID, Api, Requests, insert_disk, insert_image

from stratocache.fs import attachment_intents, image_intents
from stratocache.fs.records import Caller

pytestmark = pytest.mark.root


def test_overview_counts_and_names_what_is_wrong(api: Api, root: Requests) -> None:
    """Space, counts by state, what is under way, the latest events, and problems by subject."""
    insert_image(api.db)
    disk = insert_disk(api.db, size_bytes=5 * 2**20)
    insert_disk(api.db)
    api.db.connection.execute("UPDATE disks SET problem = 'It is gone.' WHERE uuid = ?", (disk,))
    fetch = image_intents.request_fetch(api.db, Caller("root", "admin"), IMAGE_ID)

    shown = root("GET", "/v1/overview").json

    assert shown["counts"]["images"] == {"verified": 1}
    assert shown["counts"]["disks"] == {"available": 2}
    assert shown["counts"]["operations"] == {"fetch": 1}
    assert [item["id"] for item in shown["operations"]] == [fetch.id]
    assert shown["events"][0]["kind"] == "fetch.requested"
    assert shown["space"]["disk_size_bytes"] == 6 * 2**20
    assert shown["space"]["total_bytes"] > shown["space"]["free_bytes"] > 0
    assert shown["cache"]["hit_ratio"] is None
    named = {item["subject"]: item["message"] for item in shown["problems"]}
    assert named[disk] == "It is gone."
    assert "blockd does not listen" in named["blockd"]


def test_strangers_see_their_own_part(api: Api, root: Requests, nobody: Requests) -> None:
    """Others' private disks, operations, events and problems are neither counted nor shown."""
    insert_image(api.db)
    disk = insert_disk(api.db)
    api.db.connection.execute("UPDATE disks SET problem = 'It is gone.' WHERE uuid = ?", (disk,))
    image_intents.request_fetch(api.db, Caller("root", "admin"), IMAGE_ID)
    attachment_intents.insert_attachment(
        api.db.connection, "root", "vm", "disk", "rw", disk_uuid=disk
    )

    shown = nobody("GET", "/v1/overview").json

    assert shown["counts"] == {
        "images": {"verified": 1}, "disks": {}, "snapshots": {}, "attachments": {}, "launches": {},
        "operations": {},
    }  # fmt: skip
    assert shown["operations"] == shown["events"] == []
    assert disk not in {item["subject"] for item in shown["problems"]}
    assert root("GET", "/v1/overview").json["counts"]["attachments"] == {"wanted": 1}
