"""`/v1/launches`: one request for everything a launcher needs."""

from typing import Any

import pytest
from support.api_daemon import (
    IMAGE_ID,
    Api,
    Requests,
    insert_disk,
    insert_image,
    problem,
    standing_in,
)

pytestmark = pytest.mark.root  # callers are root, or are made from root


UNKNOWN = "11111111-1111-4111-8111-111111111111"


def launch_body(api: Api) -> dict[str, Any]:
    """Return a launch with a persistent disk and a read-only image."""
    insert_image(api.db)
    return {
        "reference": IMAGE_ID,
        "instance": "vm-1",
        "disks": [insert_disk(api.db)],
        "readonly": [IMAGE_ID],
        "initiator": "iqn.2026-11.org.example:host-1",
    }


def test_launch_answers_everything_a_launcher_needs(api: Api, root: Requests) -> None:
    """POST launches answers 201: boot, and each attachment in order with its role."""
    body = launch_body(api)
    with standing_in(api.db):
        made = root("POST", "/v1/launches", body)

        assert made.status_code == 201
        assert made.headers["location"] == "/v1/launches/vm-1"
        assert made.json["state"] == "active"
        assert made.json["reference"] == IMAGE_ID
        assert [item["role"] for item in made.json["attachments"]] == ["boot", "disk", "readonly"]
        assert made.json["boot"] == made.json["attachments"][0]
        assert made.json["attachments"][1]["disk_uuid"] == body["disks"][0]
        assert made.json["attachments"][2]["access"] == "ro"
        for index, item in enumerate(made.json["attachments"]):
            assert f'dev="vd{"abc"[index]}"' in item["libvirt_xml"]
            assert item["iscsi_url"]
        assert made.json["qemu_args"].count("-blockdev") == 3
        assert root("GET", "/v1/launches/vm-1").json == made.json
        assert root("GET", "/v1/launches").json == {"launches": [made.json], "next": None}
        assert root("POST", "/v1/launches", body).json == made.json
        assert root("DELETE", "/v1/launches/vm-1").status_code == 204
        problem(root("GET", "/v1/launches/vm-1"), 404, "instance-unknown")


def test_launch_with_another_request_conflicts(api: Api, root: Requests) -> None:
    """An instance's id names one launch: asked differently it is 409."""
    body = launch_body(api)
    with standing_in(api.db):
        root("POST", "/v1/launches", body)
        other = root("POST", "/v1/launches", {**body, "disks": []})

    problem(other, 409, "instance-exists")


def test_launch_without_waiting_is_preparing(api: Api, root: Requests) -> None:
    """?wait=0 answers 202; meanwhile the launch is shown without its disks."""
    answer = root("POST", "/v1/launches", launch_body(api), params={"wait": 0})

    assert answer.status_code == 202
    shown = root("GET", "/v1/launches/vm-1").json
    assert shown["state"] == "preparing"
    assert shown["boot"] is None
    assert shown["attachments"] == []
    assert shown["operation"] == answer.json["id"]


def test_launches_of_others_do_not_exist(api: Api, root: Requests, nobody: Requests) -> None:
    """An ordinary user neither sees nor halts another's launch."""
    with standing_in(api.db):
        root("POST", "/v1/launches", launch_body(api))

    assert nobody("GET", "/v1/launches").json["launches"] == []
    problem(nobody("GET", "/v1/launches/vm-1"), 404, "instance-unknown")
    problem(nobody("DELETE", "/v1/launches/vm-1"), 404, "instance-unknown")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("disks", ["not-a-uuid"]),
        ("disks", [UNKNOWN] * 65),
        ("disks", UNKNOWN),
        ("readonly", [""]),
        ("initiator", "host-1"),
        ("initiator", "iqn.2026-11.org.example:" + "x" * 220),
        ("initiator", "iqn.2026-11.org.example:a,b"),
        ("size_bytes", -512),
        ("provisional", "yes"),
    ],
)
def test_bad_launch_field_is_named(root: Requests, field: str, value: Any) -> None:
    """Every field of a launch has its limits."""
    answer = root("POST", "/v1/launches", {"reference": "x", "instance": "y", field: value})

    assert answer.status_code == 400
    assert answer.json["code"] in ("field-invalid", "initiator-invalid")
    assert answer.json["field"].split(".")[0] == field
