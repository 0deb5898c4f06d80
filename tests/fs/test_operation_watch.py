"""Threads that wait for the ends of operations."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stratocache.cache.errors import NotFound
from stratocache.fs import image_intents
from stratocache.fs.operation_watch import OperationWatch
from stratocache.fs.records import Caller
from stratocache.fs.state import Database

ALICE = Caller("alice", "user")
LONG_S = 60.0


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    """A fresh state database."""
    database = Database(tmp_path / "state.db")
    database.migrate()
    yield database
    database.close()


def _end(db: Database, *operations: str) -> None:
    with db.transaction() as connection:
        for operation in operations:
            connection.execute("UPDATE operations SET state = 'done' WHERE id = ?", (operation,))


def _request(db: Database) -> str:
    return image_intents.request_fetch(db, ALICE, "MMZu9WvwKIro-rtBQfDk4PsKO7_").id


def test_wait_ends_at_its_limit_or_with_the_operation(db: Database) -> None:
    """A wait returns what is there at its limit, and the end as soon as another thread commits it."""
    watch, operation = OperationWatch(db), _request(db)
    assert watch.wait(operation, 0.01).state == "pending"

    thread = threading.Thread(target=_end, args=(db, operation))
    thread.start()
    assert watch.wait(operation, LONG_S).state == "done"
    thread.join()
    assert watch.wait(operation, LONG_S).state == "done"


def test_unknown_operation_is_not_found(db: Database) -> None:
    """Waiting for what is not there raises, and leaves nobody behind who would look."""
    watch = OperationWatch(db)
    with pytest.raises(NotFound, match="No operation"):
        watch.wait("nothing", 0.01)
    operation = _request(db)
    _end(db, operation)
    assert watch.wait(operation, LONG_S).state == "done"


def test_everybody_is_woken_whoever_looks(db: Database) -> None:
    """Ends in any order, the looking thread's among the first and among the last, reach all."""
    watch = OperationWatch(db)
    for order in (1, -1):
        operations = [_request(db) for _ in range(12)]
        with ThreadPoolExecutor(len(operations)) as pool:
            waits = [pool.submit(watch.wait, operation, LONG_S) for operation in operations]
            for index in range(0, len(operations), 3):
                _end(db, *operations[::order][index : index + 3])
            assert [wait.result().state for wait in waits] == ["done"] * len(operations)


def test_who_gives_up_hands_over(db: Database) -> None:
    """The thread that looks for all may reach its limit: another looks from then on."""
    watch = OperationWatch(db)
    first, second = _request(db), _request(db)
    with ThreadPoolExecutor(2) as pool:
        short = pool.submit(watch.wait, first, 0.05)
        long = pool.submit(watch.wait, second, LONG_S)
        assert short.result().state == "pending"
        _end(db, second)
        assert long.result().state == "done"
