"""The HTTP API's contract: statuses, bodies, errors, paging, entity tags."""

import json
import os
import socket
import sqlite3
import subprocess
import threading
import time

import pytest
from falcon import testing
from support.api_daemon import (
    IMAGE_ID,
    ROOT,
    Api,
    Requests,
    end_badly,
    problem,
    standing_in,
)

from stratocache.api import readiness
from stratocache.api.application import create_app
from stratocache.cache.configuration import Configuration, IscsiSettings
from stratocache.fs import image_intents, inventory
from stratocache.fs.records import Caller
from stratocache.fs.supervisor_status import State, SupervisorStatus, write_status

pytestmark = pytest.mark.root  # callers are root, or are made from root

UNKNOWN = "11111111-1111-4111-8111-111111111111"


def test_index_tells_version_limits_and_caller(root: Requests) -> None:
    """GET /v1 says what this is, which limits hold and who asks."""
    document = root("GET", "/v1").json

    assert document["name"] == "stratocache"
    assert document["version"]
    assert "launches" in document["capabilities"]
    assert document["limits"]["size_bytes_max"] == 64 * 1024**4
    assert document["caller"] == {
        "name": "root",
        "role": "admin",
        "scopes": ["admin", "disks", "images", "launch", "read"],
        "administrator": True,
    }


def test_request_without_unix_socket_is_not_authenticated(api: Api) -> None:
    """A connection that carries no credentials gets 401."""
    problem(api.client.simulate_get("/v1"), 401, "not-authenticated")


def test_unknown_path_and_method_are_problems(root: Requests) -> None:
    """Routing errors are problem documents too, and 405 names what is allowed."""
    problem(root("GET", "/v1/nothing"), 404, "route-unknown")
    answer = root("PUT", "/v1/disks")
    problem(answer, 405, "method-not-allowed")

    assert "POST" in answer.headers["allow"]


# -- operations


def test_failed_operation_answers_with_its_error(api: Api, root: Requests) -> None:
    """The error that ended an operation is the answer, with its status and the operation's URL."""
    record = {
        "category": "NotVerified",
        "code": "digest-mismatch",
        "message": "The image is not what its entry promises.",
        "field": "reference",
    }

    def fail_it() -> None:
        while not (found := inventory.operations(api.db)):
            time.sleep(0.001)
        end_badly(api.db, found[0].id, "failed", record)

    thread = threading.Thread(target=fail_it)
    thread.start()
    answer = root("POST", "/v1/launches", {"reference": "x", "instance": "vm-1"})
    thread.join()

    document = problem(answer, 422, "digest-mismatch", "reference")
    assert document["detail"] == record["message"]
    operation = inventory.operations(api.db)[0]
    assert document["instance"] == f"/v1/operations/{operation.id}"
    shown = root("GET", document["instance"]).json
    assert shown["state"] == "failed"
    assert shown["error"] == record


def test_operation_is_waited_for(api: Api, root: Requests) -> None:
    """?wait= returns as soon as the operation ends, and as it stands when time is over."""
    operation = image_intents.request_fetch(api.db, ROOT, IMAGE_ID)
    path = f"/v1/operations/{operation.id}"

    assert root("GET", path, params={"wait": 0.05}).json["state"] == "pending"
    with standing_in(api.db):
        before_s = time.monotonic()
        assert root("GET", path, params={"wait": 60}).json["state"] == "done"
        assert time.monotonic() - before_s < 30


def test_operation_is_cancelled(api: Api, root: Requests) -> None:
    """DELETE asks for the end: 202 while it is coming, 200 when it came."""
    operation = image_intents.request_fetch(api.db, ROOT, IMAGE_ID)
    path = f"/v1/operations/{operation.id}"

    asked = root("DELETE", path, params={"wait": 0})
    assert asked.status_code == 202
    assert asked.json["cancel_requested"] is True
    with standing_in(api.db, holding=IMAGE_ID):
        ended = root("DELETE", path)
    assert ended.status_code == 200
    assert ended.json["state"] == "cancelled"
    assert root("DELETE", path).json == ended.json


def test_operations_are_listed_to_their_owner(api: Api, root: Requests, nobody: Requests) -> None:
    """An ordinary user sees their own operations only; filters choose."""
    ours = image_intents.request_fetch(api.db, ROOT, "a")
    theirs = image_intents.request_fetch(api.db, Caller("nobody", "user"), "b")

    listed = root("GET", "/v1/operations").json["operations"]
    assert [item["id"] for item in listed] == [ours.id, theirs.id]
    chosen = root("GET", "/v1/operations", params={"subject": "b", "state": "pending"})
    assert [item["id"] for item in chosen.json["operations"]] == [theirs.id]
    assert root("GET", "/v1/operations", params={"kind": "halt"}).json["operations"] == []
    listed = nobody("GET", "/v1/operations").json["operations"]
    assert [item["id"] for item in listed] == [theirs.id]
    problem(nobody("GET", f"/v1/operations/{ours.id}"), 404, "operation-unknown")
    problem(nobody("DELETE", f"/v1/operations/{ours.id}"), 404, "operation-unknown")
    problem(root("GET", f"/v1/operations/{UNKNOWN}"), 404, "operation-unknown")


# -- health


def test_liveness_needs_nobody(api: Api) -> None:
    """/healthz answers as long as the process does."""
    assert api.client.simulate_get("/healthz").status_code == 200


def test_readiness_names_what_is_missing(api: Api) -> None:
    """/readyz is 503 and says which parts do not answer."""
    document = problem(api.client.simulate_get("/readyz"), 503, "not-ready", "blockd")

    for part in ("poke.sock", "not mounted", "portal"):
        assert part in document["detail"]
    assert "database" not in document["detail"]


def test_readiness_with_every_part_there(api: Api, configuration: Configuration) -> None:
    """/readyz is 200 when database, poke socket, mount and portal are there."""
    configuration.blocks.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(configuration.blocks)]
    with socket.socket() as portal, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as blockd:
        portal.bind(("127.0.0.1", 0))
        portal.listen()
        blockd.bind(str(configuration.poke_socket))
        there = configuration.model_copy(
            update={"iscsi": IscsiSettings(port=portal.getsockname()[1])}
        )
        subprocess.run(mount, check=True)
        try:
            assert readiness.faults(there, api.db) == {}
            ready = testing.TestClient(create_app(there, api.db)).simulate_get("/readyz")
            assert ready.json == {"status": "ready"}
        finally:
            subprocess.run(["umount", str(configuration.blocks)], check=True)
        assert list(readiness.faults(there, api.db)) == ["mount"]


def test_frozen_supervisor_is_not_ready(api: Api, configuration: Configuration) -> None:
    """/readyz says what the supervisor says when it has given blockd up."""
    status = SupervisorStatus("1", os.getpid(), State.FROZEN, "Guests wait; upgrade.", {}, None)
    write_status(configuration.run_dir / "supervisor.json", status.to_json())

    document = problem(api.client.simulate_get("/readyz"), 503, "not-ready", "supervisor")
    assert "Guests wait; upgrade." in document["detail"]


def test_bug_is_hidden_and_locked_database_is_named(api: Api, root: Requests) -> None:
    """An unexpected exception is 500 without its text; a state that does not answer is 503."""
    operation = image_intents.request_fetch(api.db, ROOT, "a")
    blocker = sqlite3.connect(api.configuration.database, isolation_level=None)
    blocker.execute("DROP TABLE launches")
    blocker.close()

    problem(root("GET", "/v1/launches"), 503, "state-unavailable")
    api.db.connection.execute("UPDATE operations SET request = '{broken'")
    answer = root("GET", f"/v1/operations/{operation.id}")
    document = problem(answer, 500, "internal")
    assert "broken" not in json.dumps(document)
