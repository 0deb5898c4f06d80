"""The state database: the only contract between the API, `blockd` and the command line.

SQLite in WAL mode with `synchronous=FULL`: what a committed transaction says survives power loss.
Each thread has its own connection to read, all share one to write. Readers never wait. Writers
queue: threads for their turn, processes for a lock of the kernel, which a dying one lets go of; so
nobody meets SQLite's own waiting, which is sleep of up to 0.1 s. Threads that come together share
one commit, and so one flush of the medium. The schema is in `stratocache.fs.schema`.
"""

import fcntl
import os
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from stratocache.cache.errors import Internal
from stratocache.fs.schema import MIGRATIONS
from stratocache.fs.secret_box import SecretBox

BUSY_TIMEOUT_S = 10
_GROUP_MAX = 64
"""Blocks that share a commit; the first of them waits for the last."""


class _Group:
    """Blocks of several threads that become one transaction: all are committed, or none."""

    def __init__(self) -> None:
        self.blocks = 0
        self.ended = threading.Event()
        self.error: Exception | None = None


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
        self._turn = threading.Lock()
        """Held by the thread whose block runs, or whose commit."""
        self._queued = 0
        self._group: _Group | None = None
        self._writer: sqlite3.Connection | None = None
        self._process_lock = -1

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
        # what a block needs to be undone by itself, which else is written to a file each time
        connection.execute("PRAGMA temp_store = MEMORY")
        connection.create_function("seal", 2, self.secrets.seal)
        with self._lock:
            self._opened.append(connection)
        return connection

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Run a block as one write transaction; an exception rolls all of it back.

        Returns when it has been committed, together with blocks of other threads that came
        meanwhile: a block sees what those before it did, and raises what their commit raises.
        """
        with self._lock:
            self._queued += 1
        self._turn.acquire()
        with self._lock:
            self._queued -= 1
        group, connection = self._join_group()
        reader = self._local.__dict__.get("connection")
        self._local.connection = connection
        try:
            connection.execute("SAVEPOINT block")
            check = self._local.__dict__.pop("check", None)
            if check is not None:
                check()
            yield connection
        except BaseException as error:
            self._undo_block(connection, group, error)
            raise
        finally:
            if reader is None:
                del self._local.connection
            else:
                self._local.connection = reader
            self._leave_group(group, connection)
        group.ended.wait()
        if group.error is not None:
            raise group.error

    @contextmanager
    def expecting(self, check: Callable[[], None]) -> Iterator[None]:
        """Run a block whose first transaction, in this thread, begins with a check that may raise.

        What the check reads does not change until that transaction's end.
        """
        self._local.check = check
        try:
            yield
        finally:
            self._local.__dict__.pop("check", None)

    def _join_group(self) -> tuple[_Group, sqlite3.Connection]:
        """Return the group whose transaction is open, or begin one; the caller has the turn."""
        try:
            if self._writer is None:
                self._process_lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT, 0o600)
                self._writer = self._open()
            if self._group is None:
                fcntl.flock(self._process_lock, fcntl.LOCK_EX)
                self._writer.execute("BEGIN IMMEDIATE")
                self._group = _Group()
        except BaseException:
            if self._process_lock >= 0:
                fcntl.flock(self._process_lock, fcntl.LOCK_UN)
            self._turn.release()
            raise
        return self._group, self._writer

    def _undo_block(
        self, connection: sqlite3.Connection, group: _Group, error: BaseException
    ) -> None:
        if connection.in_transaction:
            connection.execute("ROLLBACK TO block")
        else:  # SQLite has rolled all of it back, as it does when the disk is full
            group.error = sqlite3.OperationalError(f"rolled back with another's: {error}")

    def _leave_group(self, group: _Group, connection: sqlite3.Connection) -> None:
        """End a block's turn; the last of a group commits for all of it."""
        try:
            if group.error is None:
                connection.execute("RELEASE block")
        except sqlite3.Error as error:
            group.error = error
        group.blocks += 1
        with self._lock:
            more = self._queued > 0
        if more and group.error is None and group.blocks < _GROUP_MAX:
            self._turn.release()
            return
        try:
            if group.error is None:
                connection.execute("COMMIT")
        except sqlite3.Error as error:
            group.error = error
        finally:
            if connection.in_transaction:
                connection.rollback()
            self._group = None
            fcntl.flock(self._process_lock, fcntl.LOCK_UN)
            self._turn.release()
            group.ended.set()

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
            self.secrets.make_key()
            before = apply_migrations(connection, self.path)
            if 0 < before < _FIRST_SEALED:
                _forget_deleted(connection)
            with self._lock:
                self._opened.remove(connection)

    @property
    def _lock_path(self) -> Path:
        return self.path.with_suffix(".lock")

    @contextmanager
    def _lock_file(self) -> Iterator[None]:
        descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CREAT, 0o600)
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
        self._writer = None
        if self._process_lock >= 0:
            os.close(self._process_lock)
            self._process_lock = -1
        self._local = threading.local()


def apply_migrations(connection: sqlite3.Connection, path: Path) -> int:
    """Apply what a database lacks; return its version before. `path` names it for people.

    The connection has the function `seal`. Raises `Internal` (`state-too-new`) for a database that
    newer code has written, and `sqlite3.Error`.
    """
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        raise Internal(
            "state-too-new",
            f"{path} was written by a newer Stratocache (schema {version}, this one knows "
            f"{len(MIGRATIONS)}); install that version again.",
        )
    for number in range(version, len(MIGRATIONS)):
        connection.executescript(
            f"BEGIN IMMEDIATE; {MIGRATIONS[number]} PRAGMA user_version = {number + 1}; COMMIT;"
        )
    return version


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


_RECORD_EVENT = """
    INSERT INTO events (at, kind, subject, message, owner) VALUES (?1, ?2, ?3, ?4, coalesce(
        (SELECT owner FROM disks WHERE uuid = ?3),
        (SELECT owner FROM attachments WHERE id = ?3),
        (SELECT owner FROM snapshots WHERE id = ?3),
        (SELECT operations.owner FROM launches JOIN operations ON operations.id = operation_id
         WHERE instance = ?3),
        iif(substr(?2, 1, instr(?2, '.') - 1) IN
            ('fetch', 'resolve', 'verify-image', 'delete-image', 'evict'), ?5, NULL),
        (SELECT owner FROM events WHERE subject = ?3 ORDER BY number DESC LIMIT 1),
        ?5))
"""


def record_event(
    connection: sqlite3.Connection,
    kind: str,
    subject: str,
    message: str,
    *,
    asker: str | None = None,
) -> None:
    """Append an event within the caller's transaction.

    It is the subject's owner's, also when the subject has just gone. What nobody owns, as images and
    what has no row yet, is the `asker`'s.
    """
    connection.execute(_RECORD_EVENT, (now(), kind, subject, message, asker))
