"""Every route and method, with every role, every scope, and every relation to the object."""

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest
from falcon import testing
from support.api_daemon import IMAGE_BYTES, Api, entry
from support.authorisation_rows import ROWS, Relation, Row
from support.network_client import Stranger, add_account, stranger

from stratocache.api.authorisation import RULES, require_rules
from stratocache.cache.configuration import Configuration
from stratocache.cache.errors import Internal
from stratocache.fs import attachment_intents, operation_intents
from stratocache.fs.disk_intents import insert_disk
from stratocache.fs.records import ALL_SCOPES, SCOPES, Caller, DiskRequest, Role
from stratocache.fs.state import now
from stratocache.fs.tokens import create_token

ROUTES = sorted([*ROWS, *(("HEAD", template) for method, template in ROWS if method == "GET")])
ROLES: tuple[Role, ...] = ("user", "operator", "admin")
OTHER = "other"
SIZE_BYTES = 2**20
FORBIDDEN = {"not-allowed", "disk-not-yours", "attachment-not-yours", "launch-not-yours"}
ROOT = Caller("root", "admin")


class World:
    """One caller of each role, and fresh objects for each request."""

    def __init__(self, configuration: Configuration) -> None:
        api_settings = configuration.api.model_copy(update={"requests_per_s": 0})
        self.api = Api(configuration.model_copy(update={"api": api_settings}))
        self._numbers = itertools.count(1)
        db = self.api.db
        for name, role in (*((role, role) for role in ROLES), (OTHER, "user")):
            add_account(db, name, role)
        self.callers = {role: self.caller(role, ALL_SCOPES) for role in ROLES}

    def caller(self, role: Role, scopes: Any) -> Stranger:
        """Return the caller of a role, with a token of its own."""
        _token, secret = create_token(self.api.db, ROOT, role, scopes=scopes)
        return stranger(self.api).with_token(secret)

    def address(self, template: str, role: Role, relation: Relation) -> str:
        """Make what an address names, with a relation to the caller of a role, and return it."""
        number = next(self._numbers)
        owner = role if relation in ("own", "none") else OTHER
        given = {"fresh": f"n{number}", "digest": "0" * 64, "user": "somebody"}
        with self.api.db.transaction():
            if "{image_id}" in template:
                given["image_id"] = self._image(number)
            if "{uuid}" in template:
                given |= self._disk(number, owner, role, relation, template)
            if "{instance}" in template:
                given["instance"] = self._launch(f"vm{number}", owner)
            if "{operation_id}" in template:
                given["operation_id"] = self._operation(f"image{number}", owner)
        if "{name}" in template:
            given |= self._account(number, role, relation, template)
        return template.format(**given)

    def _image(self, number: int) -> str:
        image_id = f"image{number}"
        self.api.db.connection.execute(
            "INSERT INTO images (id, state, size_bytes, sha256, entry, created_at, verified_at) "
            "VALUES (?, 'verified', ?, ?, ?, ?, ?)",
            (image_id, IMAGE_BYTES, "0" * 64, entry(image_id).model_dump_json(), now(), now()),
        )
        return image_id

    def _disk(
        self, number: int, owner: str, role: Role, relation: Relation, template: str
    ) -> dict[str, str]:
        uuid = f"00000000-0000-4000-8000-{number:012d}"
        connection = self.api.db.connection
        visibility = "public" if relation == "public" else "private"
        insert_disk(
            connection, owner, uuid,
            DiskRequest(size_bytes=SIZE_BYTES, visibility=visibility),  # type: ignore[arg-type]
        )  # fmt: skip
        connection.execute("UPDATE disks SET state = 'available', form = 'raw'")
        if relation in ("read", "write"):
            connection.execute(
                "INSERT INTO disk_shares (disk_uuid, user, access, created_at) VALUES (?, ?, ?, ?)",
                (uuid, role, relation, now()),
            )
        folder = self.api.configuration.state_dir / "disks" / uuid
        folder.mkdir(parents=True)
        with (folder / "data").open("wb") as data:
            data.truncate(SIZE_BYTES)
        given = {"uuid": uuid}
        if "{snapshot_id}" in template:
            given["snapshot_id"] = f"00000000-0000-4000-9000-{number:012d}"
            connection.execute(
                "INSERT INTO snapshots (id, disk_uuid, state, form, size_bytes, tag, transient, "
                "owner, created_at, frozen_at) VALUES (?, ?, 'available', 'file', ?, '', 0, ?, ?, ?)",
                (given["snapshot_id"], uuid, SIZE_BYTES, owner, now(), now()),
            )
        if "{attachment_id}" in template:
            given["attachment_id"] = attachment_intents.insert_attachment(
                connection, owner, f"vm{number}", "disk", "rw", disk_uuid=uuid
            )
            connection.execute("UPDATE attachments SET state = 'ready'")
        return given

    def _operation(self, reference: str, owner: str) -> str:
        operation = operation_intents.add_operation(
            self.api.db.connection, Caller(owner, "user"), "fetch", reference, {}
        )
        return operation.id

    def _launch(self, instance: str, owner: str) -> str:
        operation_id = self._operation(instance, owner)
        wanted = {"reference": "some", "instance": instance}
        self.api.db.connection.execute(
            "INSERT INTO launches (instance, operation_id, request, state, created_at) "
            "VALUES (?, ?, ?, 'active', ?)",
            (instance, operation_id, json.dumps(wanted), now()),
        )
        return instance

    def _account(
        self, number: int, role: Role, relation: Relation, template: str
    ) -> dict[str, str]:
        name: str = role
        if relation == "private":
            name = f"account{number}"
            add_account(self.api.db, name)
        given = {"name": name}
        if "{token_id}" in template:
            given["token_id"] = create_token(self.api.db, ROOT, name, scopes=["read"])[0].id
        return given


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The application on a database with the callers."""
    root = tmp_path_factory.mktemp("matrix")
    for name in ("state", "run"):
        (root / name).mkdir(mode=0o700)
    made = World(Configuration(state_dir=root / "state", run_dir=root / "run"))
    yield made
    made.api.db.close()


def row_of(method: str, template: str) -> Row:
    """Return the row of a route; HEAD has that of GET."""
    return ROWS["GET" if method == "HEAD" else method, template]


def send(caller: Stranger, method: str, address: str, row: Row, fresh: str) -> testing.Result:
    """Send the right request of a row."""
    body = row.body
    if isinstance(body, dict):
        body = {
            name: value.replace("{fresh}", fresh) if isinstance(value, str) else value
            for name, value in body.items()
        }
    return caller(method, address + row.query, body, headers=row.headers)


def judge(letter: str, row: Row, answer: testing.Result, method: str) -> None:
    """Check one answer against its letter."""
    code = (
        "" if method == "HEAD" or not answer.text.startswith("{") else answer.json.get("code", "")
    )
    if letter == "A":
        assert answer.status_code in row.allowed
        assert code not in FORBIDDEN
    elif letter == "F":
        assert answer.status_code == 403
        assert method == "HEAD" or code in FORBIDDEN
    elif letter == "C":
        assert (answer.status_code, code) == (409, "own-rights")
    else:
        assert answer.status_code == 404
        assert method == "HEAD" or code.endswith("-unknown")


def test_every_route_has_a_row(world: World) -> None:
    """A route without a row here, or in the program's table, is found."""
    assert ROWS.keys() == RULES.keys()
    app = world.api.client.app
    app.add_route("/v1/forgotten", _Forgotten())
    with pytest.raises(Internal, match="GET /v1/forgotten has no row"):
        require_rules(app)


@pytest.mark.parametrize(("method", "template"), ROUTES, ids=lambda part: part)
def test_roles_and_relations(world: World, method: str, template: str) -> None:
    """Each role gets of each object what the row says."""
    row = row_of(method, template)
    for role, letters in zip(ROLES, row.letters, strict=True):
        assert len(letters) == len(row.relations)
        for relation, letter in zip(row.relations, letters, strict=True):
            address = world.address(template, role, relation)
            caller = world.callers[role]
            answer = send(caller, method, address, row, f"f{address.count('/')}{role}{letter}x")
            try:
                judge(letter, row, answer, method)
            except AssertionError as error:
                text = f"{role}, {relation}: {letter} expected, {answer.status_code} {answer.text}"
                raise AssertionError(text) from error


@pytest.mark.parametrize(("method", "template"), ROUTES, ids=lambda part: part)
def test_scopes(world: World, method: str, template: str) -> None:
    """Even an administrator's token does only what its scope is for, and strangers get nothing."""
    row = row_of(method, template)
    for scope in SCOPES:
        address = world.address(template, "admin", row.relations[-1])
        answer = send(world.caller("admin", [scope]), method, address, row, f"s{scope}x")
        missing = answer.status_code == 403
        assert missing == (row.scope not in ("any", "open", scope)), (scope, answer.text)
        if missing and method != "HEAD":
            assert answer.json["code"] == "scope-missing"
        world.api.db.connection.execute("DELETE FROM tokens WHERE scopes <> ?",
                                        (json.dumps(list(SCOPES)),))  # fmt: skip

    browser = Stranger(world.api.client, {"Accept": "text/html, application/json"})
    answer = send(browser, method, address, row, "strange")
    if row.scope == "open":
        assert answer.status_code in row.allowed
    elif template.startswith(("/v1", "/metrics")):
        assert answer.status_code == 401
    else:
        assert (answer.status_code, answer.headers["location"][:12]) == (303, "/login?next=")


def test_writing_shares_and_what_a_body_names(world: World) -> None:
    """Rights on what a body names are judged too: read-write attachments, clones, launches, owners."""
    cells = {
        "own": ("A", "A", "A"), "read": ("A", "F", "F"), "write": ("A", "A", "F"),
        "public": ("A", "F", "F"), "private": ("N", "N", "N"),
    }  # fmt: skip
    for role in ("user", "operator"):
        for relation, (clone, attach, _own) in cells.items():
            template = "/v1/disks/{uuid}/snapshots/{snapshot_id}"
            _, _, _, uuid, _, snapshot = world.address(template, role, relation).split("/")  # type: ignore[arg-type]
            hidden = "F" if role == "operator" else "N"
            caller = world.callers[role]
            cloned = caller("POST", "/v1/disks?wait=0", {"snapshot": snapshot})
            judge(hidden if clone == "N" else clone, ROWS["POST", "/v1/disks"], cloned, "POST")
            taken = caller("GET", f"/v1/disks/{uuid}/content?snapshot={snapshot}")
            assert (taken.status_code in (403, 404)) == (clone == "N")
            wanted = {"reference": "some", "instance": f"w-{role}-{relation}", "disks": [uuid]}
            launched = caller("POST", "/v1/launches?wait=0", wanted)
            judge(
                hidden if attach == "N" else attach, ROWS["POST", "/v1/launches"], launched, "POST"
            )
            wanted = {"instance": f"a-{role}-{relation}", "access": "rw"}
            attached = caller("POST", f"/v1/disks/{uuid}/attachments?wait=0", wanted)
            judge(
                hidden if attach == "N" else attach, ROWS["POST", "/v1/launches"], attached, "POST"
            )
            given = caller("PATCH", f"/v1/disks/{uuid}", {"owner": role + "s"})
            assert given.status_code in (403, 404)
            pinned = caller("POST", "/v1/images?wait=0", {"reference": "some", "pin": True})
            assert pinned.status_code == (202 if role == "operator" else 403)


def test_lists_show_what_one_may_see(world: World) -> None:
    """Each list has of others' objects those that one may see, and secrets of one's own only."""
    address = "/v1/disks/{uuid}/attachments/{attachment_id}"
    seen = {"user": {"own", "read", "write", "public"}}
    for role in ROLES:
        made = {
            world.address(address, role, relation).split("/")[3]: relation
            for relation in ("own", "read", "write", "public", "private")
        }
        caller = world.callers[role]
        for path, name, key in (
            ("/v1/disks", "disks", "uuid"), ("/v1/attachments", "attachments", "disk_uuid"),
        ):  # fmt: skip
            listed = caller("GET", f"{path}?limit=1000&sort=-created_at").json[name]
            found = {made[item[key]] for item in listed if item[key] in made}
            assert found == seen.get(role, set(made.values())), (role, path)
            for item in listed if name == "attachments" else ():
                shown = item["chap"] is not None
                assert shown == (role == "admin" or item["owner"] == role)
    for path in ("operations", "launches", "events"):
        mine = json.dumps(world.callers["user"]("GET", f"/v1/{path}?limit=1000").json)
        assert "other" not in mine


class _Forgotten:
    def on_get(self, request: object, response: object) -> None:
        """Answer."""
