"""`/v1/disks/{uuid}/attachments`: connection details, exclusiveness, who sees secrets."""

import json

import pytest
from support.api_daemon import (
    Api,
    Requests,
    insert_disk,
    problem,
    standing_in,
)

pytestmark = pytest.mark.root  # callers are root, or are made from root


def test_attachment_tells_how_to_connect(api: Api, root: Requests) -> None:
    """POST attachments answers 201 with every connection detail of DESIGN.md section 8."""
    uuid = insert_disk(api.db)
    with standing_in(api.db):
        made = root("POST", f"/v1/disks/{uuid}/attachments", {"instance": "vm-1"})

        assert made.status_code == 201
        assert made.json["portal"] == "127.0.0.1:1"
        assert made.json["lun"] == 1
        assert made.json["target_iqn"] == f"iqn.2026-11.org.stratocache:{made.json['id']}"
        assert len(made.json["chap"]["secret"]) == 16
        assert made.json["iscsi_url"].endswith(f"{made.json['target_iqn']}/1")
        assert made.json["libvirt_xml"].startswith("<disk ")
        assert made.json["chap"]["secret"] not in " ".join(made.json["qemu_args"])
        path = made.headers["location"]
        assert root("GET", path).json == made.json
        listed = root("GET", f"/v1/disks/{uuid}/attachments").json
        assert listed == {"attachments": [made.json], "next": None}
        assert root("GET", f"/v1/disks/{uuid}").json["attached_to"] == ["vm-1"]
        problem(root("DELETE", f"/v1/disks/{uuid}"), 409, "disk-attached")
        assert root("DELETE", path).status_code == 204
        problem(root("GET", path), 404, "attachment-unknown")


def test_second_writer_is_told_who_holds_the_disk(api: Api, root: Requests) -> None:
    """A read-write attachment is exclusive: 409 names the holder."""
    path = f"/v1/disks/{insert_disk(api.db)}/attachments"
    with standing_in(api.db):
        root("POST", path, {"instance": "vm-1"})
        refused = problem(root("POST", path, {"instance": "vm-2"}), 409, "disk-attached")

    assert "vm-1" in refused["detail"]


def test_credentials_are_shown_to_their_owner_only(
    api: Api, root: Requests, nobody: Requests
) -> None:
    """Who may see a public disk sees who has it, but not the secret to log in."""
    path = f"/v1/disks/{insert_disk(api.db, visibility='public')}/attachments"
    with standing_in(api.db):
        made = root("POST", path, {"instance": "vm-1"}).json
    shown = nobody("GET", path).json["attachments"][0]

    assert shown["instance"] == "vm-1"
    assert shown["chap"] is None
    assert shown["iscsi_url"] is None
    assert made["chap"]["secret"] not in json.dumps(shown)


@pytest.mark.parametrize("instance", ["", ".hidden", "a/b", "a b", "x" * 129, "ü", "a\n"])
def test_bad_instance_is_refused(api: Api, root: Requests, instance: str) -> None:
    """An instance's id is checked against its pattern."""
    answer = root("POST", f"/v1/disks/{insert_disk(api.db)}/attachments", {"instance": instance})

    problem(answer, 400, "field-invalid", "instance")


def test_attachment_of_another_disk_is_unknown(api: Api, root: Requests) -> None:
    """An attachment is only found below its own disk."""
    uuid, other = insert_disk(api.db), insert_disk(api.db)
    with standing_in(api.db):
        made = root("POST", f"/v1/disks/{uuid}/attachments", {"instance": "vm-1"}).json

    wrong = f"/v1/disks/{other}/attachments/{made['id']}"
    problem(root("GET", wrong), 404, "attachment-unknown")
    problem(root("DELETE", wrong), 404, "attachment-unknown")
