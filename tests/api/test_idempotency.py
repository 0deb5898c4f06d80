"""`Idempotency-Key`: sent again, a request has been carried out once, whatever died in between."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from typing import Any

import httpx
import pytest
from support.api_daemon import (
    IMAGE_ID,
    Api,
    Requests,
    insert_disk,
    insert_image,
    perform,
    problem,
    serving,
    standing_in,
)

from stratocache.cache.configuration import Configuration
from stratocache.fs import disk_intents, idempotency, inventory
from stratocache.fs.idempotency import Asked, Key
from stratocache.fs.records import Caller, DiskRequest
from stratocache.fs.state import Database

pytestmark = pytest.mark.root

ADMIN = Caller("root", "admin")
BODY = {"size_bytes": 2**20}
KEY = {"Idempotency-Key": "a-key"}


def count(api: Api, table: str) -> int:
    """Return how many rows there are."""
    row = api.db.row(f"SELECT count(*) FROM {table}")
    assert row is not None
    return int(row[0])


def test_a_request_is_carried_out_once(api: Api, root: Requests, nobody: Requests) -> None:
    """The same key gives the same answer, byte for byte; another caller's key is another key."""
    with standing_in(api.db):
        made = root("POST", "/v1/disks", BODY, headers=KEY)
        assert made.status_code == 201
        assert "idempotency-replayed" not in made.headers
        assert root("DELETE", made.headers["location"]).status_code == 204
        again = root("POST", "/v1/disks", BODY, headers=KEY)
        other = nobody("POST", "/v1/disks", BODY, headers=KEY)

    assert (again.status_code, again.content) == (201, made.content)
    for name in ("location", "etag", "content-type"):
        assert again.headers[name] == made.headers[name]
    assert again.headers["idempotency-replayed"] == "true"
    assert other.json["uuid"] != made.json["uuid"]
    assert [disk.owner for disk in inventory.disks(api.db, ADMIN)] == ["nobody"]


def test_a_key_means_one_request(api: Api, root: Requests) -> None:
    """Another body, address or query with a key that was used is refused, and does nothing."""
    with standing_in(api.db):
        assert root("POST", "/v1/disks", BODY, headers=KEY).status_code == 201
    before = count(api, "operations")
    for path, body, query in (
        ("/v1/disks", {"size_bytes": 2**21}, {}),
        ("/v1/disks", BODY, {"wait": 0}),
        ("/v1/images", {"reference": IMAGE_ID}, {}),
    ):
        answer = root("POST", path, body, params=query, headers=KEY)
        problem(answer, 422, "idempotency-key-reused", "Idempotency-Key")

    assert count(api, "operations") == before


def test_accepted_and_failed_work_is_not_begun_again(api: Api, root: Requests) -> None:
    """A 202 is answered again, and so is the error of an operation that failed."""
    accepted = root("POST", "/v1/disks", BODY, params={"wait": 0}, headers=KEY)
    again = root("POST", "/v1/disks", BODY, params={"wait": 0}, headers=KEY)
    assert (accepted.status_code, again.status_code) == (202, 202)
    assert again.json == accepted.json

    fetch = {"reference": IMAGE_ID}
    with standing_in(api.db, holding=IMAGE_ID), api.caller() as other:
        worker = threading.Thread(target=_cancel_what_comes, args=(api, other))
        worker.start()
        failed = root(
            "POST", "/v1/images", fetch, params={"wait": 60}, headers={"Idempotency-Key": "f"}
        )
        worker.join(60)
    operations = count(api, "operations")
    replayed = root(
        "POST", "/v1/images", fetch, params={"wait": 60}, headers={"Idempotency-Key": "f"}
    )
    assert failed.status_code == 409
    assert (replayed.status_code, replayed.content) == (409, failed.content)
    assert count(api, "operations") == operations


def _cancel_what_comes(api: Api, requests: Requests) -> None:
    while True:
        found = requests("GET", "/v1/operations", params={"kind": "fetch"}).json["operations"]
        if found:
            requests("DELETE", f"/v1/operations/{found[0]['id']}")
            return


def test_what_changed_nothing_may_be_mended(api: Api, root: Requests) -> None:
    """A request that was refused leaves its key free, for the same request or a mended one."""
    problem(root("POST", "/v1/disks", {}, headers=KEY), 400, "size-missing", "size_bytes")
    problem(
        root("POST", "/v1/disks", {"size_bytes": 1}, headers=KEY),
        400,
        "field-invalid",
        "size_bytes",
    )
    with standing_in(api.db):
        assert root("POST", "/v1/disks", BODY, headers=KEY).status_code == 201


def test_secrets_are_made_anew_not_stored(api: Api, root: Requests) -> None:
    """Attachments and launches are answered by what is there now; when it is gone that is said."""
    insert_image(api.db)
    path = f"/v1/disks/{insert_disk(api.db)}/attachments"
    body = {"instance": "vm"}
    launch = {"reference": IMAGE_ID, "instance": "vm-2"}
    with standing_in(api.db):
        made = root("POST", path, body, headers=KEY)
        launched = root("POST", "/v1/launches", launch, headers={"Idempotency-Key": "l"})
        again = root("POST", path, body, headers=KEY)
        relaunched = root("POST", "/v1/launches", launch, headers={"Idempotency-Key": "l"})
        stored = [bytes(row[0] or b"") for row in api.db.rows("SELECT body FROM idempotency_keys")]
        root("DELETE", made.headers["location"])
        gone = root("POST", path, body, headers=KEY)

    assert made.status_code == again.status_code == launched.status_code == 201
    assert again.json == made.json
    assert relaunched.json == launched.json
    assert again.headers["location"] == made.headers["location"]
    secret = made.json["chap"]["secret"].encode()
    assert stored == [b"", b""]
    assert secret not in b"".join(stored)
    problem(gone, 409, "idempotency-answer-gone", "Idempotency-Key")


@pytest.mark.parametrize("key", ["", " ", "x" * 256, "a b", "ä"])
def test_bad_keys_are_refused(root: Requests, key: str) -> None:
    """A key has 1 to 255 visible ASCII characters."""
    answer = root("POST", "/v1/disks", BODY, headers={"Idempotency-Key": key})

    problem(answer, 400, "idempotency-key-invalid", "Idempotency-Key")


def test_a_body_that_is_too_large_is_refused(root: Requests) -> None:
    """Who sends a key is bound by the same limits."""
    answer = root("POST", "/v1/disks", {"tag": "x" * 2**20}, headers=KEY)

    problem(answer, 413, "body-too-large")


def test_the_same_at_the_same_time_is_done_once(configuration: Configuration) -> None:
    """Of twelve copies of a request, sent to several workers at once, one is carried out; the others
    are told to wait, and then get its answer."""
    several = configuration.model_copy(
        update={"api": configuration.api.model_copy(update={"workers": 2})}
    )
    db = Database(configuration.database)
    db.migrate()
    answers: list[httpx.Response] = []

    def send() -> None:
        transport = httpx.HTTPTransport(uds=str(several.api_socket))
        with httpx.Client(transport=transport, base_url="http://api", timeout=60) as client:
            while True:
                answer = client.post("/v1/disks", json=BODY, headers=KEY)
                answers.append(answer)
                if answer.status_code != 409:
                    return

    with serving(several), standing_in(db):
        threads = [threading.Thread(target=send) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)

    made = [answer for answer in answers if answer.status_code == 201]
    assert len(made) == 12
    assert len({answer.content for answer in made}) == 1
    assert len([a for a in made if "idempotency-replayed" not in a.headers]) == 1
    assert {a.json()["code"] for a in answers if a.status_code != 201} <= {"idempotency-key-busy"}
    assert len(inventory.disks(db, ADMIN)) == 1
    db.close()


_DYING = """
import sys
from stratocache.fs import disk_intents, idempotency
from stratocache.fs.idempotency import Asked, Key
from stratocache.fs.records import Caller, DiskRequest
from stratocache.fs.state import Database
from pathlib import Path
db = Database(Path(sys.argv[1]))
key = Key("root", "a-key")
assert idempotency.claim(db, key, Asked("POST", sys.argv[3], sys.argv[4])) is None
idempotency.set_current(key)
if sys.argv[2] == "after":
    disk_intents.create_disk(db, Caller("root", "admin"), DiskRequest(size_bytes=2**20))
print("here", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_worker_that_dies_leaves_no_lie(api: Api, root: Requests, when: str) -> None:
    """While a worker lives its key is busy. When it is killed before it did anything the next who
    comes does it; when it is killed after that, the operation is the answer."""
    body = json.dumps(BODY).encode()
    digest = hashlib.sha256(body).hexdigest()
    program = [sys.executable, "-c", _DYING, str(api.db.path), when, "/v1/disks", digest]
    headers = {**KEY, "Content-Type": "application/json"}

    def send() -> Any:
        return root.client.simulate_post(
            "/v1/disks", body=body, headers=headers, extras={"gunicorn.socket": root.connection}
        )

    with subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        problem(send(), 409, "idempotency-key-busy", "Idempotency-Key")
        os.kill(process.pid, signal.SIGKILL)
        process.wait(60)
    with standing_in(api.db):
        first, second = send(), send()

    assert len(inventory.disks(api.db, ADMIN)) == 1
    if when == "before":
        assert (first.status_code, second.status_code) == (201, 201)
        assert second.content == first.content
    else:
        assert (first.status_code, second.status_code) == (202, 202)
        assert first.headers["location"] == second.headers["location"]
        operation = inventory.operation(api.db, first.json["id"])
        assert operation.subject == inventory.disks(api.db, ADMIN)[0].uuid


def test_keys_are_forgotten_after_a_day(api: Api) -> None:
    """A key is kept for 24 hours, and not longer."""
    asked = Asked("POST", "/v1/disks", "0" * 64)
    old, young = Key("root", "old"), Key("root", "young")
    for key in (old, young):
        assert idempotency.claim(api.db, key, asked) is None
        idempotency.set_current(key)
        operation = disk_intents.create_disk(api.db, ADMIN, DiskRequest(size_bytes=2**20))
        perform(api.db, operation)
        idempotency.keep(api.db, key, idempotency.Answer(None, 201, "application/json", body=b"{}"))
    idempotency.set_current(None)
    shift = (
        "UPDATE idempotency_keys SET created_at = '2026-01-01T00:00:00.000000Z' WHERE key = 'old'"
    )
    api.db.connection.execute(shift)

    assert idempotency.claim(api.db, old, asked) is None
    kept = idempotency.claim(api.db, young, asked)
    assert kept is not None
    assert kept.body == b"{}"
