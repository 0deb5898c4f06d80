"""Requests that carry a key are carried out once: what is known of each key, for a day.

A key is *running* from before the request is carried out until its answer is kept. In between, the
transaction that records an operation also notes it with the key: should the process die then, the
operation is the answer; should it die before, nothing was done, and the next who comes does it.
"""

import os
import sqlite3
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path

from stratocache.cache.errors import Conflict, NotVerified
from stratocache.fs.state import Database, now, timestamp

KEPT_S = 24 * 3600
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_START_TIME = 19
"""Where proc(5) has it in `stat`, counted from behind the name of the program."""


@dataclass(frozen=True, slots=True)
class Key:
    """Who sent which key."""

    caller: str
    key: str


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks for: the same key must always mean the same."""

    method: str
    path: str
    """With the query."""
    body_sha256: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request with a key led to."""

    operation_id: str | None
    status: int | None = None
    """None = the process died before it could answer; there is an operation then."""
    content_type: str | None = None
    location: str | None = None
    etag: str | None = None
    body: bytes | None = None
    """None = to be made anew, of what is at the location."""


_current: ContextVar[Key | None] = ContextVar("idempotency_key", default=None)


def set_current(key: Key | None) -> None:
    """Say whose operations this thread records from now on."""
    _current.set(key)


def note_operation(connection: sqlite3.Connection, operation_id: str) -> None:
    """Note an operation with the key that it was asked for with, within its own transaction."""
    key = _current.get()
    if key is not None:
        connection.execute(
            "UPDATE idempotency_keys SET operation_id = ? WHERE caller = ? AND key = ?",
            (operation_id, key.caller, key.key),
        )


def claim(db: Database, key: Key, asked: Asked) -> Answer | None:
    """Take a key for oneself, and return None; or return what it led to.

    Raises `NotVerified` (`idempotency-key-reused`) and `Conflict` (`idempotency-key-busy`).
    """
    with db.transaction() as connection:
        limit = timestamp(datetime.now(UTC) - timedelta(seconds=KEPT_S))
        connection.execute("DELETE FROM idempotency_keys WHERE created_at < ?", (limit,))
        row = db.row(
            "SELECT * FROM idempotency_keys WHERE caller = ? AND key = ?", key.caller, key.key
        )
        if row is None or _is_abandoned(row):
            connection.execute(
                "INSERT OR REPLACE INTO idempotency_keys (caller, key, method, path, body_sha256, "
                "state, worker, created_at) VALUES (?, ?, ?, ?, ?, 'running', ?, ?)",
                (key.caller, key.key, asked.method, asked.path, asked.body_sha256, worker(), now()),
            )
            return None
    if Asked(row["method"], row["path"], row["body_sha256"]) != asked:
        raise NotVerified(
            "idempotency-key-reused",
            f"The key {key.key!r} was sent with another request; make a new key for each.",
            field="Idempotency-Key",
        )
    if row["state"] == "running" and _is_alive(row["worker"]):
        raise Conflict(
            "idempotency-key-busy",
            f"The request with the key {key.key!r} is being carried out; try again in a moment.",
            field="Idempotency-Key",
        )
    names = ("operation_id", "status", "content_type", "location", "etag", "body")
    return Answer(**{name: row[name] for name in names})


def _is_abandoned(row: sqlite3.Row) -> bool:
    """Tell whether a key was taken by a process that died before it did anything."""
    undone = row["state"] == "running" and row["operation_id"] is None
    return undone and not _is_alive(row["worker"])


def has_operation(db: Database, key: Key) -> bool:
    """Tell whether an operation was recorded with a key."""
    row = db.row(
        "SELECT operation_id FROM idempotency_keys WHERE caller = ? AND key = ?",
        key.caller, key.key,
    )  # fmt: skip
    return row is not None and row["operation_id"] is not None


def keep(db: Database, key: Key, answer: Answer) -> None:
    """Keep an answer for who sends the key again; its operation has been noted already."""
    with db.transaction() as connection:
        connection.execute(
            "UPDATE idempotency_keys SET state = 'done', status = ?, content_type = ?, "
            "location = ?, etag = ?, body = ? WHERE caller = ? AND key = ?",
            (answer.status, answer.content_type, answer.location, answer.etag, answer.body,
             key.caller, key.key),
        )  # fmt: skip


def forget(db: Database, key: Key) -> None:
    """Let a key be used again, as nothing came of it."""
    with db.transaction() as connection:
        connection.execute(
            "DELETE FROM idempotency_keys WHERE caller = ? AND key = ?", (key.caller, key.key)
        )


def worker() -> str:
    """Return a name of this process that no other ever had or will have."""
    return _name_of(os.getpid()) or str(os.getpid())


def _is_alive(name: str) -> bool:
    pid = name.rpartition(" ")[2]
    return pid.isdigit() and _name_of(int(pid)) == name


def _name_of(pid: int) -> str | None:
    try:
        status = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    if status[0] in "ZX":
        return None
    return f"{_boot()} {status[_START_TIME]} {pid}"


@cache
def _boot() -> str:
    return _BOOT_ID.read_text().strip()
