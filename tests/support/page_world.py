"""An appliance as rows alone, with something of everything that the pages show, and a server for it.

The server is for whoever wants to look without a daemon: `python -m support.page_world PORT` shows
the pages as root sees them.
"""

import hashlib
import json
import socketserver
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from stratocache.api.application import create_app
from stratocache.cache import bootset, seals
from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.cache.configuration import Configuration, IscsiSettings
from stratocache.cache.manifest import Manifest
from stratocache.fs import attachment_intents, image_intents, shares, snapshot_intents
from stratocache.fs.records import Caller
from stratocache.fs.state import Database, record_event
from support.api_daemon import IMAGE_ID, caller_socket, entry, insert_disk, insert_image, perform
from support.web_server import running

ROOT = Caller("root", "admin")
USER = Caller("nobody", "user")
HOSTILE = "<script>alert('x')</script>\"' onload=alert(1) & {{ 7*7 }}"
"""What people may write, and no browser may run."""
OTHER_IMAGE = "MMZu9WvwKIro-rtBQfDk4PsKO7_"
COLD_IMAGE = "BBBBBBBBBBBBBBBBBBBBBBBBBBB"
FETCHING_IMAGE = "AAAAAAAAAAAAAAAAAAAAAAAAAAA"


@dataclass(frozen=True)
class World:
    """What was made."""

    disk: str
    """Attached, with snapshots, of an image; root's."""
    public: str
    private: str
    """Of nobody, whom no other ordinary user sees."""
    running: str
    """An operation."""
    failed: str
    resolved: str


def furnish(db: Database, state_dir: Path) -> World:
    """Fill an empty database."""
    _images(db, state_dir)
    disk = insert_disk(db, size_bytes=20 * 1024**3, tag="results")
    db.connection.execute(
        "UPDATE disks SET base_image = ?, base_manifest = ?, form = 'overlay' WHERE uuid = ?",
        (IMAGE_ID, IMAGE_ID, disk),
    )
    insert_disk(db, size_bytes=2**30, tag=HOSTILE[:40], volatile=True)
    public = insert_disk(db, size_bytes=2**30, tag="shared data", visibility="public")
    private = insert_disk(db, USER, size_bytes=5 * 2**30)
    for tag in ("before the upgrade", "", HOSTILE[:40]):
        perform(db, snapshot_intents.create_snapshot(db, ROOT, disk, tag=tag))
    snapshot = db.rows("SELECT id FROM snapshots ORDER BY number")[0]["id"]
    insert_disk(db, snapshot=snapshot, size_bytes=20 * 1024**3, tag="clone")
    perform(
        db, attachment_intents.attach(db, ROOT, disk, instance="vm-1", access="rw", initiator=None)
    )
    attachment_intents.attach(
        db, ROOT, public, instance="vm-2", access="ro", initiator="iqn.2026-11.a:b"
    )
    db.connection.execute(
        "UPDATE attachments SET problem = 'tgtd does not answer.' WHERE instance = 'vm-2'"
    )
    shares.share(db, ROOT, disk, "jane", "read")
    shares.share(db, ROOT, disk, "joe", "write")
    _spread_times(db)
    operations = _operations(db)
    record_event(db.connection, "image.verified", IMAGE_ID, HOSTILE)
    db.connection.execute(
        "INSERT INTO losses VALUES (?, 'chunk', ?, ?, 'No origin has it any more.')",
        ("ab" * 32, _ago(60), json.dumps([IMAGE_ID])),
    )
    db.connection.execute(
        "UPDATE scrub SET started_at = ?, chunks = 812, chunk_bytes = 400000000, position = 'ab'",
        (_ago(120),),
    )
    return World(disk, public, private, **operations)


def _ago(seconds: float) -> str:
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat().replace("+00:00", "Z")


def _images(db: Database, state_dir: Path) -> None:
    insert_image(db, title="Debian 12 for batch work")
    insert_image(db, OTHER_IMAGE, HOSTILE)
    insert_image(db, FETCHING_IMAGE, "A large image that is on its way here")
    insert_image(db, COLD_IMAGE, "An image that nobody has used for long")
    for number, image_id in enumerate((OTHER_IMAGE, COLD_IMAGE)):
        _write_manifest(state_dir, image_id, 8 * number)
    db.connection.execute(
        "UPDATE images SET state = 'provisional', verified_at = NULL, size_bytes = ? WHERE id = ?",
        (4 * 1024**3, FETCHING_IMAGE),
    )
    db.connection.execute("UPDATE images SET pinned = 1 WHERE id = ?", (IMAGE_ID,))
    second = int(time.time()) // 10 * 10
    for image_id, local_bytes in ((IMAGE_ID, 4 * 2**20), (FETCHING_IMAGE, 3 * 2**30)):
        history = [
            [second - 10 * age, int(9e6 * (1 + (age * 7919) % 13)), 0.1] for age in range(80, 0, -1)
        ]
        db.connection.execute(
            "INSERT INTO image_traffic (image_id, remote_bytes, remote_wait_s, dedup_bytes, "
            "local_bytes, rate_bytes_s, updated_at, hits, hit_bytes, misses, miss_bytes, "
            "cache_saved_bytes, history) VALUES (?, 1200000000, 8.25, 0, ?, 9e6, ?, 8123, 4000000000, "
            "37, 19000000, 700000000, ?)",
            (image_id, local_bytes, _ago(5), json.dumps(history)),
        )
    for name, value in (("hits", 8123.0), ("misses", 37.0), ("remote_bytes", 1.2e9),
                        ("cache_saved_bytes", 7e8)):  # fmt: skip
        db.connection.execute("INSERT INTO tallies VALUES (?, '', ?)", (name, value))
    size_bytes = entry().size_bytes
    bootset.write(state_dir / "bootsets" / IMAGE_ID, bootset.encode([0, 1, 5], size_bytes))


def _write_manifest(state_dir: Path, image_id: str, first: int) -> None:
    """Let an image have chunks, which are nowhere, from a number on; half of them are another's."""
    (state_dir / "manifests").mkdir(exist_ok=True)
    size_bytes = entry().size_bytes
    numbers = range(first // 2, first // 2 + size_bytes // CHUNK_BYTES)
    digests = b"".join(hashlib.sha256(str(number).encode()).digest() for number in numbers)
    seals.write_manifest(state_dir, image_id, Manifest(size_bytes, digests))


def _spread_times(db: Database) -> None:
    """Let snapshots be of different days, and the disk older than they."""
    for day, row in enumerate(reversed(db.rows("SELECT id FROM snapshots ORDER BY number"))):
        db.connection.execute(
            "UPDATE snapshots SET created_at = ? WHERE id = ?",
            (_ago(86400 * (2 * day + 1)), row["id"]),
        )
    db.connection.execute("UPDATE disks SET created_at = ?", (_ago(86400 * 12),))


def _operations(db: Database) -> dict[str, str]:
    running = image_intents.request_fetch(db, ROOT, FETCHING_IMAGE)
    failed = image_intents.request_fetch(db, ROOT, "stratuslab:unknown")
    resolved = image_intents.request_fetch(db, ROOT, OTHER_IMAGE)
    db.connection.execute(
        "UPDATE operations SET state = 'running', progress_bytes = 3000000000, total_bytes = ?, "
        "rate_bytes_s = 9e6 WHERE id = ?",
        (4 * 1024**3, running.id),
    )
    error = {"category": "NotFound", "code": "reference-unknown", "message": HOSTILE}
    db.connection.execute(
        "UPDATE operations SET state = 'failed', error = ? WHERE id = ?",
        (json.dumps(error), failed.id),
    )
    candidates = [
        {"source": "http://127.0.0.1:9/entry.xml", "endorser": "mallory@example.org",
         "endorsed_at": _ago(9e5), "code": "endorser-untrusted", "message": HOSTILE},
        {"source": "http://127.0.0.1:9/other.xml", "endorser": "a@example.org",
         "endorsed_at": _ago(9e6), "code": None, "message": None},
    ]  # fmt: skip
    result: dict[str, Any] = {
        "accepted": True, "entry": entry(OTHER_IMAGE, HOSTILE).model_dump(mode="json"),
        "code": None, "message": "a@example.org endorsed it; the signature verifies.",
        "candidates": candidates, "cached": None,
    }  # fmt: skip
    db.connection.execute(
        "UPDATE operations SET kind = 'resolve', state = 'done', result = ? WHERE id = ?",
        (json.dumps(result), resolved.id),
    )
    return {"running": running.id, "failed": failed.id, "resolved": resolved.id}


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def page_server(
    configuration: Configuration, db: Database, port: int = 0, *, local: bool = True
) -> Iterator[str]:
    """Serve the application on the loopback interface; yields its address.

    To root, as on the Unix socket, or as on the network, where nobody is known.
    """
    app = create_app(configuration, db)
    with caller_socket() as connection:

        def as_root(environ: dict[str, Any], start_response: Any) -> Any:
            known = {"gunicorn.socket": connection} if local else {}
            return app({**environ, **known}, start_response)

        server = make_server("127.0.0.1", port, as_root, _Server, _Quiet)
        with running(server):
            yield f"http://127.0.0.1:{server.server_port}"


def main() -> None:
    """Serve the pages until Ctrl-C."""
    with tempfile.TemporaryDirectory(prefix="sc-") as folder:
        state_dir, run_dir = Path(folder) / "state", Path(folder) / "run"
        state_dir.mkdir(mode=0o700)
        run_dir.mkdir()
        configuration = Configuration(
            state_dir=state_dir, run_dir=run_dir, iscsi=IscsiSettings(port=1)
        )
        db = Database(configuration.database)
        db.migrate()
        world = furnish(db, state_dir)
        with page_server(configuration, db, int(sys.argv[1])) as address:
            print(json.dumps({"address": address, **world.__dict__}), flush=True)
            threading.Event().wait()


if __name__ == "__main__":
    main()
