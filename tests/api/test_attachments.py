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


def test_epoch_protects_what_is_newer(api: Api, root: Requests) -> None:
    """`?epoch=` of another attachment than the present one is 409 and changes nothing."""
    path = f"/v1/disks/{insert_disk(api.db)}/attachments"
    with standing_in(api.db):
        first = root("POST", path, {"instance": "vm-1"}).json
        assert root("DELETE", f"{path}/{first['id']}?epoch=1&force=true").status_code == 204
        second = root("POST", path, {"instance": "vm-1"}).json
        address = f"{path}/{second['id']}"
        assert (first["epoch"], second["epoch"]) == (1, 2)
        problem(root("DELETE", f"{address}?epoch=1"), 409, "epoch-stale", "epoch")
        problem(root("DELETE", f"{address}?epoch=x"), 400, "parameter-invalid", "epoch")
        problem(root("DELETE", f"{address}?force=perhaps"), 400, "parameter-invalid", "force")
        problem(root("DELETE", f"{path}/{first['id']}?epoch=2"), 404, "attachment-unknown")
        assert root("GET", address).json == second
        assert root("DELETE", f"{address}?epoch=2").status_code == 204


def test_lease_is_renewed(api: Api, root: Requests, nobody: Requests) -> None:
    """An attachment with a lease says until when; PUT moves that, within limits, for its owner."""
    path = f"/v1/disks/{insert_disk(api.db, visibility='public')}/attachments"
    for wrong in (9, 30 * 24 * 3600 + 1, "60"):
        answer = root("POST", path, {"instance": "vm-1", "lease_s": wrong})
        problem(answer, 400, "field-invalid", "lease_s")
    with standing_in(api.db):
        made = root("POST", path, {"instance": "vm-1", "lease_s": 10}).json
    lease = f"{path}/{made['id']}/lease"
    assert made["lease_s"] == 10
    renewed = root("PUT", f"{lease}?epoch=1", {"lease_s": 3600})
    assert renewed.status_code == 200
    assert renewed.json["lease_s"] == 3600
    assert renewed.json["lease_expires_at"] > made["lease_expires_at"]
    again = root("PUT", lease, {}).json
    assert again["lease_expires_at"] > renewed.json["lease_expires_at"]
    problem(root("PUT", f"{lease}?epoch=7", {}), 409, "epoch-stale", "epoch")
    problem(nobody("PUT", lease, {}), 403, "attachment-not-yours")


def test_migration_over_http(api: Api, root: Requests, nobody: Requests) -> None:
    """POST migrate answers with a second attachment; complete ends the first, DELETE the second."""
    path = f"/v1/disks/{insert_disk(api.db, visibility='public')}/attachments"
    with standing_in(api.db):
        source = root("POST", path, {"instance": "vm-1"}).json
        begin = f"{path}/{source['id']}/migrate"
        problem(root("POST", begin, {"instance": "b", "timeout_s": 3601}), 400, "field-invalid",
                "timeout_s")  # fmt: skip
        problem(nobody("POST", begin, {"instance": "b"}), 403, "attachment-not-yours")
        aborted = root("POST", begin, {"instance": "vm-2"})
        assert aborted.status_code == 201
        assert aborted.json["migrates"] == source["id"]
        assert aborted.json["migration_expires_at"] is not None
        problem(root("POST", begin, {"instance": "vm-3"}), 409, "disk-migrating")
        assert root("DELETE", aborted.headers["location"]).status_code == 204

        new = root("POST", begin, {"instance": "vm-1", "timeout_s": 60}).json
        done = root("POST", f"{path}/{new['id']}/complete?epoch={new['epoch']}", {})
        assert (done.status_code, done.json["migrates"], done.json["epoch"]) == (200, None, 3)
        assert [item["id"] for item in root("GET", path).json["attachments"]] == [new["id"]]
        assert root("POST", f"{path}/{new['id']}/complete", {}).status_code == 200
        problem(root("POST", f"{path}/{source['id']}/complete", {}), 404, "attachment-unknown")


def test_problems_are_shown(api: Api, root: Requests) -> None:
    """What is wrong with a disk or keeps an attachment from ending is in their documents."""
    uuid = insert_disk(api.db)
    with standing_in(api.db):
        made = root("POST", f"/v1/disks/{uuid}/attachments", {"instance": "vm-1"})
    assert root("GET", f"/v1/disks/{uuid}").json["problems"] == []
    api.db.connection.execute("UPDATE attachments SET problem = 'It is stuck.'")
    api.db.connection.execute("UPDATE disks SET problem = 'It is gone.'")

    assert root("GET", made.headers["location"]).json["problem"] == "It is stuck."
    assert root("GET", f"/v1/disks/{uuid}").json["problems"] == ["It is gone.", "It is stuck."]
