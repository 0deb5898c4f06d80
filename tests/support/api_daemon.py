"""For tests of the API: a state database, callers with real peer credentials, and a stand-in for
`blockd` that ends operations by rows alone."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from falcon import testing

from stratocache.api.application import create_app
from stratocache.cache.configuration import ApiSettings, Configuration, IscsiSettings
from stratocache.cache.entry import Endorser, Entry
from stratocache.fs import attachment_intents, disk_intents, inventory
from stratocache.fs.listener import listen
from stratocache.fs.records import Caller, DiskRequest, LaunchRequest, Operation
from stratocache.fs.state import Database, now
from support import conformity

ROOT = Caller("root", "admin", of_host=True)
IMAGE_ID = "GOaxJFdoEXvqAm9ArJgnZ0_ky6F"
IMAGE_BYTES = 4 * 1024**2
_START_TIMEOUT_S = 30


def entry(identifier: str = IMAGE_ID, title: str = "a small system") -> Entry:
    """Return an entry such as a catalogue gives."""
    return Entry(
        catalogue="stratuslab",
        identifier=identifier,
        size_bytes=IMAGE_BYTES,
        digests={"sha256": "0" * 64},
        locations=("http://127.0.0.1:9/image.gz",),
        compression="gz",
        endorser=Endorser(email="a@example.org", subject="CN=a", issuer="CN=a"),
        endorsed_at="2026-01-02T03:04:05Z",  # type: ignore[arg-type]
        trust="signed",
        title=title,
    )


def insert_image(db: Database, identifier: str = IMAGE_ID, title: str = "a small system") -> None:
    """Insert a verified image."""
    db.connection.execute(
        "INSERT INTO images (id, state, size_bytes, sha256, entry, created_at, verified_at) "
        "VALUES (?, 'verified', ?, ?, ?, ?, ?)",
        (
            identifier,
            IMAGE_BYTES,
            "0" * 64,
            entry(identifier, title).model_dump_json(),
            now(),
            now(),
        ),
    )


def insert_disk(db: Database, caller: Caller = ROOT, **fields: Any) -> str:
    """Insert an available disk; return its UUID."""
    operation = disk_intents.create_disk(db, caller, DiskRequest(**{"size_bytes": 2**20, **fields}))
    perform(db, operation)
    return operation.subject


def perform(db: Database, operation: Operation) -> None:
    """End an operation as `blockd` would, as far as rows are concerned."""
    with db.transaction() as connection:
        result = _STEPS[operation.kind](db, operation)
        connection.execute(
            "UPDATE operations SET state = 'done', result = ?, updated_at = ? WHERE id = ?",
            (json.dumps(result), now(), operation.id),
        )


def end_badly(db: Database, operation_id: str, state: str, record: dict[str, str]) -> None:
    """End an operation with an error."""
    db.connection.execute(
        "UPDATE operations SET state = ?, error = ?, updated_at = ? WHERE id = ?",
        (state, json.dumps(record), now(), operation_id),
    )


def _fetch(db: Database, operation: Operation) -> dict[str, Any]:
    identifier = operation.request["reference"]
    if inventory.find_image(db, identifier) is None:
        insert_image(db, identifier)
    return {"image": identifier}


def _launch(db: Database, operation: Operation) -> dict[str, Any]:
    wanted = LaunchRequest(**operation.request)
    connection = db.connection
    boot = "00000000-0000-4000-8000-000000000001"
    disk_intents.insert_disk(
        connection, operation.owner, boot, DiskRequest(size_bytes=IMAGE_BYTES, volatile=True)
    )
    attachment_intents.insert_attachment(
        connection, operation.owner, wanted.instance, "boot", "rw", disk_uuid=boot,
        initiator=wanted.initiator, position=0,
    )  # fmt: skip
    for position, uuid in enumerate(wanted.disks, 1):
        attachment_intents.insert_attachment(
            connection, operation.owner, wanted.instance, "disk", "rw", disk_uuid=uuid,
            position=position,
        )  # fmt: skip
    for position, reference in enumerate(wanted.readonly, 1 + len(wanted.disks)):
        attachment_intents.insert_attachment(
            connection, operation.owner, wanted.instance, "readonly", "ro", image_id=reference,
            position=position,
        )  # fmt: skip
    connection.execute("UPDATE disks SET state = 'available', form = 'raw'")
    connection.execute("UPDATE attachments SET state = 'ready'")
    connection.execute(
        "UPDATE launches SET state = 'active', boot_disk = ? WHERE instance = ?",
        (boot, wanted.instance),
    )
    return {"instance": wanted.instance}


def _resize(db: Database, operation: Operation) -> dict[str, Any]:
    db.connection.execute(
        "UPDATE disks SET size_bytes = ?, generation = generation + 1 WHERE uuid = ?",
        (operation.request["size_bytes"], operation.subject),
    )
    return {"disk": operation.subject}


def _save(db: Database, operation: Operation) -> dict[str, Any]:
    db.connection.execute("DELETE FROM snapshots WHERE transient = 1")
    return {"image": IMAGE_ID, "metadata": "<RDF/>"}


def _execute(*statements: str) -> Callable[[Database, Operation], dict[str, Any]]:
    def step(db: Database, operation: Operation) -> dict[str, Any]:
        for statement in statements:
            db.connection.execute(statement, {"subject": operation.subject})
        return {}

    return step


def _resolve(db: Database, operation: Operation) -> dict[str, Any]:
    """Accept every reference but one."""
    refused = operation.subject == "refused"
    return {
        "accepted": not refused,
        "entry": entry().model_dump(mode="json"),
        "code": "endorser-refused" if refused else None,
        "message": "Because.",
        "candidates": [
            {"source": "http://127.0.0.1/x", "endorser": "b@example.org", "endorsed_at": None,
             "code": "entry-expired", "message": "It has\x1b expired."},
        ],
        "cached": None,
    }  # fmt: skip


_STEPS: dict[str, Callable[[Database, Operation], dict[str, Any]]] = {
    "fetch": _fetch,
    "resolve": _resolve,
    "launch": _launch,
    "create-disk": _execute(
        "UPDATE disks SET state = 'available', form = 'raw' WHERE uuid = :subject"
    ),
    "attach": _execute("UPDATE attachments SET state = 'ready' WHERE id = :subject"),
    "migrate": _execute("UPDATE attachments SET state = 'ready' WHERE id = :subject"),
    "detach": _execute(
        "DELETE FROM attachments WHERE id = :subject",
        "UPDATE attachments SET migrates = NULL, migration_expires_at = NULL "
        "WHERE migrates = :subject",
    ),
    "snapshot": _execute(
        "UPDATE snapshots SET state = 'available', form = 'file', frozen_at = created_at "
        "WHERE id = :subject"
    ),
    "delete-snapshot": _execute("DELETE FROM snapshots WHERE id = :subject"),
    "rollback": _execute("UPDATE disks SET generation = generation + 1 WHERE uuid = :subject"),
    "resize": _resize,
    "hydrate": _execute("UPDATE disks SET form = 'raw' WHERE uuid = :subject"),
    "save": _save,
    "delete-disk": _execute(
        "DELETE FROM snapshots WHERE disk_uuid = :subject",
        "DELETE FROM disks WHERE uuid = :subject",
    ),
    "delete-image": _execute("DELETE FROM images WHERE id = :subject"),
    "halt": _execute(
        "DELETE FROM attachments WHERE instance = :subject",
        "DELETE FROM launches WHERE instance = :subject",
        "DELETE FROM disks WHERE state = 'deleting'",
    ),
}


@contextmanager
def configured(state_dir: Path, **api: Any) -> Iterator[Configuration]:
    """Yield a small configuration with directories of its own; the run directory's path is short."""
    settings = {"workers": 1, "threads": 6, "group": "no-such-group", **api}
    with tempfile.TemporaryDirectory(prefix="sc-") as run_dir:
        yield Configuration(
            state_dir=state_dir,
            run_dir=Path(run_dir),
            iscsi=IscsiSettings(port=1),
            api=ApiSettings.model_validate(settings),
        )


@contextmanager
def standing_in(db: Database, *, holding: str = "") -> Iterator[None]:
    """Perform operations as they come; those whose subject is `holding` run until cancelled."""
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(0.005):
            rows = db.rows("SELECT id FROM operations WHERE state IN ('pending', 'running')")
            for row in rows:
                operation = inventory.operation(db, row["id"])
                if operation.subject != holding:
                    perform(db, operation)
                elif operation.cancel_requested:
                    record = {"category": "Cancelled", "code": "cancelled", "message": "Stopped."}
                    end_badly(db, operation.id, "cancelled", record)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def caller_socket(user: int = 0) -> Iterator[socket.socket]:
    """Yield a connected Unix socket whose peer has a user's credentials; needs root for others."""
    os.seteuid(user)
    try:
        ours, theirs = socket.socketpair()
    finally:
        os.seteuid(0)
    with ours, theirs:
        yield ours


@dataclass
class Requests:
    """Sends requests to the application as one user; every answer must be as it is described."""

    client: testing.TestClient
    connection: socket.socket

    def __call__(self, method: str, path: str, body: Any = None, **options: Any) -> testing.Result:
        """Send a request; `body` is sent as JSON."""
        if body is not None:
            options["json"] = body
        options["extras"] = {"gunicorn.socket": self.connection}
        result: testing.Result = self.client.simulate_request(method, path, **options)
        conformity.check(
            method, path, result.status_code, result.headers.get("content-type", ""), result.content
        )
        return result


class Api:
    """The application on a database, and the users that talk to it."""

    def __init__(self, configuration: Configuration) -> None:
        self.configuration = configuration
        self.db = Database(configuration.database)
        self.db.migrate()
        self.client = testing.TestClient(create_app(configuration, self.db))

    @contextmanager
    def caller(self, user: int = 0) -> Iterator[Requests]:
        """Yield what sends requests as a user."""
        with caller_socket(user) as connection:
            yield Requests(self.client, connection)


@contextmanager
def serving(configuration: Configuration, prelude: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """Run the real API process until the end of the block; a `prelude` in Python goes before it."""
    program = ["-m", "stratocache.api.server"]
    if prelude:
        program = ["-c", f"{prelude}\nfrom stratocache.api.server import main\nmain()"]
    path = configuration.run_dir / "configuration.json"
    path.write_text(configuration.model_dump_json())
    reports, ready = os.pipe()
    with listen(configuration.api_socket, "no-such-group") as listener, open(reports, "rb") as pipe:
        descriptors = (listener.fileno(), ready)
        process = subprocess.Popen(
            [sys.executable, *program, "--config-json", str(path),
             "--listen-fd", str(listener.fileno()), "--ready-fd", str(ready)],
            stdin=subprocess.DEVNULL, pass_fds=descriptors,
        )  # fmt: skip
        os.close(ready)
        assert pipe.read(1) == b"R"
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_START_TIMEOUT_S)
        finally:
            process.kill()


def listens(path: Path) -> bool:
    """Whether somebody accepts connections on a Unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def problem(result: Any, status: int, code: str, field: str | None = None) -> dict[str, Any]:
    """Check a problem document and return it."""
    assert result.status_code == status, result.text
    assert result.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = result.json
    assert document["code"] == code
    assert document["status"] == status
    assert document["type"] == f"urn:stratocache:problem:{code}"
    assert document["title"]
    assert document["detail"]
    assert document.get("field") == field
    return document
