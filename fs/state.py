"""The state database: the only contract between the API, `blockd` and the command line.

SQLite in WAL mode with `synchronous=FULL`: what a committed transaction says survives power loss.
Each thread has its own connection. Readers never wait; writers wait for one another at most
`BUSY_TIMEOUT_S`. The schema is in `stratocache.fs.schema`.
"""

import fcntl
import os
import sqlite3
import stat
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from stratocache.cache.errors import Internal
from stratocache.fs.schema import MIGRATIONS
from stratocache.fs.secret_box import SecretBox

BUSY_TIMEOUT_S = 10

_FIRST_SEALED = 3
"""Number of the migration that seals secrets."""


class Database:
    """One state database, opened lazily by each thread that uses it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.secrets = SecretBox(path.with_name("secrets.key"))
        """Opens what SQL's `seal(attachment id, secret)` has sealed."""
        self._local = threading.local()
        self._opened: list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        self._writing = threading.Lock()

    @property
    def connection(self) -> sqlite3.Connection:
        """This thread's connection, in autocommit mode with rows by name."""
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._open()
            self._local.connection = connection
        return connection

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.create_function("seal", 2, self.secrets.seal)
        with self._lock:
            self._opened.append(connection)
        return connection

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Run a block as one write transaction; an exception rolls all of it back."""
        connection = self.connection
        # threads queue here: SQLite makes a second writer sleep, up to 0.1 s at a time
        with self._writing:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")

    def rows(self, query: str, *values: Any) -> list[sqlite3.Row]:
        """Return all rows of a query."""
        return self.connection.execute(query, values).fetchall()

    def row(self, query: str, *values: Any) -> sqlite3.Row | None:
        """Return the first row of a query, or None."""
        found: sqlite3.Row | None = self.connection.execute(query, values).fetchone()
        return found

    def data_version(self) -> int:
        """Return a number that changes when another connection has committed (PRAGMA data_version)."""
        version: int = self.connection.execute("PRAGMA data_version").fetchone()[0]
        return version

    def migrate(self) -> None:
        """Bring the schema up to date; refuse a database that newer code has written.

        Creates the file with mode 0600, and the key of the secrets in it. Raises `Internal` with
        code `state-too-new`.
        """
        # Without a descriptor: closing any one of a file drops all locks that this process has on it
        # (fcntl(2)), SQLite's too; another process then removes the log that we write to.
        with suppress(FileExistsError):
            os.mknod(self.path, stat.S_IFREG | 0o600)
        with self._lock_file(), closing(self._open()) as connection:
            version: int = connection.execute("PRAGMA user_version").fetchone()[0]
            if version > len(MIGRATIONS):
                raise Internal(
                    "state-too-new",
                    f"{self.path} was written by a newer Stratocache (schema {version}, this one "
                    f"knows {len(MIGRATIONS)}); install that version again.",
                )
            self.secrets.make_key()
            for number in range(version, len(MIGRATIONS)):
                connection.executescript(
                    f"BEGIN IMMEDIATE; {MIGRATIONS[number]} PRAGMA user_version = {number + 1}; COMMIT;"
                )
            if 0 < version < _FIRST_SEALED:
                _forget_deleted(connection)
            with self._lock:
                self._opened.remove(connection)

    @contextmanager
    def _lock_file(self) -> Iterator[None]:
        descriptor = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Close every thread's connection."""
        with self._lock:
            opened, self._opened = self._opened, []
        for connection in opened:
            connection.close()
        self._local = threading.local()


def _forget_deleted(connection: sqlite3.Connection) -> None:
    """Rewrite the file and empty its log: both keep the bytes of what is not there any more."""
    connection.execute("VACUUM")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def now() -> str:
    """Return the present time as the database stores it: RFC 3339, UTC, microseconds."""
    return timestamp(datetime.now(UTC))


def later(seconds: float) -> str:
    """Return the time that is in `seconds`, as the database stores it."""
    return timestamp(datetime.now(UTC) + timedelta(seconds=seconds))


def timestamp(moment: datetime) -> str:
    """Return a time, which must be in UTC, as the database stores it; such texts sort as times."""
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def record_event(connection: sqlite3.Connection, kind: str, subject: str, message: str) -> None:
    """Append an event within the caller's transaction."""
    connection.execute(
        "INSERT INTO events (at, kind, subject, message) VALUES (?, ?, ?, ?)",
        (now(), kind, subject, message),
    )
