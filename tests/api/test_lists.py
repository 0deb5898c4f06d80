"""Lists: the same paging, sorting and filters everywhere."""

from typing import Any

import pytest
from support.api_daemon import (
    IMAGE_ID,
    ROOT,
    Api,
    Requests,
    insert_disk,
    insert_image,
    problem,
    standing_in,
)

from stratocache.fs import attachment_intents, inventory
from stratocache.fs.records import Caller

pytestmark = pytest.mark.root  # callers are root, or are made from root

LISTS = {
    "attachments": ("created_at", "instance", "state", "owner"),
    "disks": ("created_at", "tag", "size_bytes", "owner", "state"),
    "images": ("created_at", "id", "size_bytes", "last_used_at", "state"),
    "launches": ("created_at", "instance", "state"),
    "operations": ("created_at", "updated_at", "kind", "state"),
    "events": ("number",),
}


def walk(requests: Requests, name: str, **parameters: Any) -> list[dict[str, Any]]:
    """Return all items of a list, by pages of two."""
    found: list[dict[str, Any]] = []
    while True:
        answer = requests("GET", f"/v1/{name}", params={"limit": 2, **parameters})
        assert answer.status_code == 200, answer.text
        assert len(answer.json[name]) <= 2
        found += answer.json[name]
        if answer.json["next"] is None:
            return found
        parameters["after"] = answer.json["next"]


def populate(api: Api, root: Requests) -> list[str]:
    """Make five of everything; return the UUIDs of the disks."""
    tags = ["bb", "a", "bb", "c", ""]
    disks = [
        insert_disk(api.db, tag=tag, size_bytes=2**20 * (i % 3 + 1)) for i, tag in enumerate(tags)
    ]
    for i in range(5):
        insert_image(api.db, IMAGE_ID[:-1] + "abcde"[i])
    with standing_in(api.db):
        for i, uuid in enumerate(disks):
            body = {"instance": f"vm-{i % 2}{i}"}
            assert root("POST", f"/v1/disks/{uuid}/attachments", body).status_code == 201
    for i in (3, 1, 2, 5, 4):
        body = {"reference": IMAGE_ID, "instance": f"launch-{i}"}
        assert root("POST", "/v1/launches", body, params={"wait": 0}).status_code == 202
    return disks


def test_every_list_is_walked_in_every_order(api: Api, root: Requests) -> None:
    """Pages of two show every item once, in the order of the field, backwards with a minus."""
    populate(api, root)
    for name, orders in LISTS.items():
        whole = root("GET", f"/v1/{name}").json[name]
        assert len(whole) >= 5, name
        key = next(key for key in ("id", "uuid", "number", "instance") if key in whole[0])
        for order in orders:
            up, down = walk(root, name, sort=order), walk(root, name, sort="-" + order)
            values = [item[order] for item in up]

            assert {item[key] for item in up} == {item[key] for item in whole}, (name, order)
            assert len(up) == len(whole)
            if None not in values:
                assert values == sorted(values), (name, order)
            assert [item[key] for item in down] == [item[key] for item in reversed(up)]


def test_pages_stay_whole_when_items_go(api: Api, root: Requests) -> None:
    """An item that vanishes between two pages takes no other with it, in an order by tag either."""
    disks = populate(api, root)
    whole = [item["uuid"] for item in walk(root, "disks", sort="tag")]
    first = root("GET", "/v1/disks", params={"limit": 2, "sort": "tag"}).json
    api.db.connection.execute("DELETE FROM attachments")
    api.db.connection.execute("DELETE FROM disks WHERE uuid = ?", (whole[1],))
    rest = walk(root, "disks", sort="tag", after=first["next"])

    assert [item["uuid"] for item in rest] == whole[2:]
    assert set(whole) == set(disks)


def test_pages_pass_any_text(api: Api, root: Requests) -> None:
    """Texts that people write, with joiners, blanks and quotes in them, end pages as others do."""
    tags = ["👨\u200d👩\u200d👧", "\u00a0", "'\"", "é", "\u202etag", "%_"]
    for tag in tags:
        insert_disk(api.db, tag=tag)

    found = [item["tag"] for item in walk(root, "disks", sort="-tag")]
    assert found == sorted(tags, reverse=True)


FILTERED: list[tuple[str, dict[str, str], int]] = [
    ("disks", {"tag": "bb"}, 2),
    ("disks", {"tag": "bb", "state": "creating"}, 0),
    ("disks", {"visibility": "public"}, 0),
    ("disks", {"kind": "data"}, 5),
    ("attachments", {"instance": "vm-11"}, 1),
    ("attachments", {"state": "ready"}, 5),
    ("attachments", {"image": IMAGE_ID}, 0),
    ("launches", {"instance": "launch-3"}, 1),
    ("launches", {"state": "active"}, 0),
    ("operations", {"kind": "attach"}, 5),
    ("operations", {"kind": "attach", "owner": "anna"}, 0),
    ("images", {"state": "verified"}, 5),
    ("events", {"kind": "launch."}, 5),
    ("events", {"subject": "launch-1"}, 1),
]


def test_filters_choose(api: Api, root: Requests) -> None:
    """Each filter leaves what has the value; several must all hold."""
    populate(api, root)

    for name, parameters, count in FILTERED:
        assert len(walk(root, name, **parameters)) == count, (name, parameters)


def test_attachments_of_a_disk_are_found_from_both_sides(api: Api, root: Requests) -> None:
    """`?disk=` gives the same document as the disk's own list."""
    disk = populate(api, root)[2]

    listed = root("GET", "/v1/attachments", params={"disk": disk}).json
    assert listed == root("GET", f"/v1/disks/{disk}/attachments").json
    assert len(listed["attachments"]) == 1


BAD_PAGES = [
    ({"limit": "0"}, "limit"),
    ({"limit": "1001"}, "limit"),
    ({"limit": "x"}, "limit"),
    ({"sort": "colour"}, "sort"),
    ({"sort": "--created_at"}, "sort"),
    ({"after": "!"}, "after"),
    ({"after": "e30"}, "after"),
    ({"after": "W10"}, "after"),
    ({"after": "WyJ0YWciLHt9LDFd"}, "after"),
    ({"after": "x" * 5000}, "after"),
    ({"after": "é"}, "after"),
    ({"after": "WyItdGFnIiwiXHVkODAwIiwxXQ"}, "after"),  # half of a character
]


def test_bad_pages_are_refused_by_field(root: Requests) -> None:
    """A limit, an order or a mark that cannot be is refused, and nothing else goes wrong."""
    for name in LISTS:
        for parameters, field in BAD_PAGES:
            answer = root("GET", f"/v1/{name}", params=parameters)
            problem(answer, 400, "parameter-invalid", field)


def test_mark_of_another_order_is_refused(api: Api, root: Requests) -> None:
    """A mark is good for the order it came with only; in events it is a plain number."""
    populate(api, root)
    for name, orders in LISTS.items():
        mark = root("GET", f"/v1/{name}", params={"limit": 1}).json["next"]
        if name == "events":
            assert mark == "1"
        else:
            answer = root("GET", f"/v1/{name}", params={"after": mark, "sort": orders[1]})
            problem(answer, 400, "parameter-invalid", "after")


def test_strangers_list_what_they_may_see(api: Api, root: Requests, nobody: Requests) -> None:
    """Of others a user sees public disks with their attachments, and all images; no secret."""
    disks = populate(api, root)
    api.db.connection.execute("UPDATE disks SET visibility = 'public' WHERE uuid = ?", (disks[0],))
    own = insert_disk(api.db, Caller("nobody", "user"))
    assert inventory.find_disk(api.db, own) is not None
    attachment_intents.insert_attachment(
        api.db.connection, "nobody", "theirs", "disk", "rw", disk_uuid=own
    )  # fmt: skip

    assert {item["uuid"] for item in walk(nobody, "disks")} == {disks[0], own}
    seen = walk(nobody, "attachments")
    assert [item["disk_uuid"] for item in seen] == [disks[0], own]
    assert [item["chap"] is None for item in seen] == [True, False]
    assert walk(nobody, "launches") == []
    assert len(walk(nobody, "images")) == 5
    assert {item["owner"] for item in walk(nobody, "operations")} == {"nobody"}
    assert {item["owner"] for item in walk(nobody, "events")} == {"nobody"}
    assert ROOT.administrator
