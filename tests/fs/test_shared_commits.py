"""Transactions of the state database: threads share commits, processes take turns."""

import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from stratocache.fs.state import Database, record_event

Block = Callable[[sqlite3.Connection, int], None]
THREADS = 16
ROUNDS = 20

_ANOTHER_PROCESS = """
import sys
from pathlib import Path
from stratocache.fs.state import Database, record_event
db = Database(Path(sys.argv[1]))
for number in range(int(sys.argv[2])):
    with db.transaction() as connection:
        record_event(connection, "test", f"{sys.argv[3]}-{number}", "x")
        print("in", flush=True)
        if sys.argv[4] == "wait":
            sys.stdin.read()
"""


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    """A fresh state database."""
    database = Database(tmp_path / "state.db")
    database.migrate()
    yield database
    database.close()


def _subjects(db: Database) -> set[str]:
    return {row["subject"] for row in db.rows("SELECT subject FROM events")}


def _process(db: Database, rounds: int, name: str, how: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", _ANOTHER_PROCESS, db.path, str(rounds), name, how],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


class _Crowd:
    """Threads that are sure to share one commit: the first waits in its block for the others."""

    def __init__(self, db: Database, size: int) -> None:
        self._db = db
        self._size = size
        self._begun = threading.Event()

    def run(self, block: Block) -> list[BaseException | None]:
        """Run `block(connection, number)` in all threads; return what each raised."""
        with ThreadPoolExecutor(self._size) as pool:
            first = pool.submit(self._first, block)
            self._begun.wait()
            others = [pool.submit(self._other, block, n) for n in range(1, self._size)]
            return [future.exception() for future in (first, *others)]

    def _first(self, block: Block) -> None:
        with self._db.transaction() as connection:
            self._begun.set()
            while self._db._queued < self._size - 1:
                pass
            block(connection, 0)

    def _other(self, block: Block, number: int) -> None:
        with self._db.transaction() as connection:
            block(connection, number)


def test_block_that_raises_is_undone_alone(db: Database) -> None:
    """Of blocks that share a commit, one that raises leaves nothing, and the others all they did."""

    def block(connection: sqlite3.Connection, number: int) -> None:
        record_event(connection, "test", str(number), "x")
        if number == 3:
            raise KeyError(number)

    raised = _Crowd(db, THREADS).run(block)

    assert [n for n, error in enumerate(raised) if error is not None] == [3]
    assert isinstance(raised[3], KeyError)
    assert _subjects(db) == {str(n) for n in range(THREADS) if n != 3}


def test_commit_that_fails_fails_for_all(db: Database) -> None:
    """A commit that is refused is reported to every block of it, and leaves nothing of any."""
    orphan = (
        "PRAGMA defer_foreign_keys = ON; INSERT INTO launches "
        "(instance, operation_id, request, state, created_at) "
        "VALUES ('vm', 'none', '{}', 'preparing', '')"
    )

    def block(connection: sqlite3.Connection, number: int) -> None:
        record_event(connection, "test", str(number), "x")
        if number == 2:
            for statement in orphan.split("; "):
                connection.execute(statement)

    raised = _Crowd(db, THREADS).run(block)

    assert all(isinstance(error, sqlite3.IntegrityError) for error in raised), raised
    assert _subjects(db) == set()
    with db.transaction() as connection:
        record_event(connection, "test", "later", "x")
    assert _subjects(db) == {"later"}


def test_full_disk_loses_no_block_in_silence(db: Database) -> None:
    """When the database cannot grow, what did not raise is there and what raised is not."""
    pages = db.rows("PRAGMA page_count")[0][0]
    with db.transaction() as connection:
        connection.execute(f"PRAGMA max_page_count = {pages + 8}")

    def fill(number: int) -> bool:
        with suppress(sqlite3.OperationalError), db.transaction() as connection:
            record_event(connection, "test", str(number), "x" * 3000)
            return True
        return False

    with ThreadPoolExecutor(THREADS) as pool:
        kept = list(pool.map(fill, range(THREADS * 4)))
    assert {str(n) for n, there in enumerate(kept) if there} == _subjects(db)
    assert 0 < sum(kept) < len(kept)


def test_processes_and_threads_write_at_once(db: Database) -> None:
    """Threads of several processes write without an error, and each sees its own writes after."""
    processes = [_process(db, ROUNDS, f"p{n}", "go") for n in range(2)]

    def write(number: int) -> None:
        for turn in range(ROUNDS):
            subject = f"t{number}-{turn}"
            with db.transaction() as connection:
                record_event(connection, "test", subject, "x")
            assert db.row("SELECT 1 FROM events WHERE subject = ?", subject) is not None

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(write, range(THREADS)))
    for process in processes:
        assert process.communicate(timeout=60)[0].count(b"in") == ROUNDS
        assert process.returncode == 0
    assert len(_subjects(db)) == ROUNDS * (THREADS + 2)


def test_writer_that_is_killed_holds_up_nobody(db: Database) -> None:
    """What a process had written in its block goes with it, and the next writer goes on."""
    process = _process(db, 1, "dead", "wait")
    assert process.stdout is not None
    assert process.stdout.readline() == b"in\n"
    process.kill()
    with db.transaction() as connection:
        record_event(connection, "test", "alive", "x")
    process.communicate()
    assert _subjects(db) == {"alive"}
