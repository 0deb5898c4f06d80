"""The state database between processes: nobody's transactions are lost by what another does."""

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

from stratocache.fs.state import Database, record_event

_COUNT = """
import sqlite3, sys
from contextlib import closing
with closing(sqlite3.connect(sys.argv[1], timeout=20)) as connection:
    print(connection.execute("SELECT count(*) FROM events").fetchone()[0])
"""


def _record(database: Database, message: str) -> None:
    with database.transaction() as connection:
        record_event(connection, "disk.test", "disk", message)


def _counted_elsewhere(path: Path) -> int:
    """Return how many events another process finds, which is the last to close, as it believes."""
    done = subprocess.run(
        [sys.executable, "-c", _COUNT, str(path)], check=True, capture_output=True, text=True
    )
    return int(done.stdout)


def test_second_opening_keeps_the_locks_of_the_first(tmp_path: Path) -> None:
    """What one part of a process commits is seen by all after another part migrated the schema."""
    path = tmp_path / "state.db"
    first, second = Database(path), Database(path)
    with closing(first), closing(second):
        first.migrate()
        _record(first, "before")
        second.migrate()
        assert _counted_elsewhere(path) == 1
        # without its lock the log would be gone now, and this transaction with it
        _record(first, "after")
        assert _counted_elsewhere(path) == 2
        assert len(second.rows("SELECT * FROM events")) == 2


def test_raw_descriptor_is_the_danger(tmp_path: Path) -> None:
    """The proof above finds it when somebody opens and closes the database file beside SQLite."""
    path = tmp_path / "state.db"
    with closing(Database(path)) as database:
        database.migrate()
        _record(database, "before")
        os.close(os.open(path, os.O_RDONLY))
        _counted_elsewhere(path)
        _record(database, "after")
        assert _counted_elsewhere(path) == 1


def test_file_is_nobody_elses_from_its_first_moment(tmp_path: Path) -> None:
    """The file, which will hold secrets, is made with mode 0600 whatever the umask is."""
    path = tmp_path / "state.db"
    before = os.umask(0)
    try:
        with closing(Database(path)) as database:
            database.migrate()
            assert {path.stat().st_mode & 0o777 for path in tmp_path.glob("state.db*")} == {0o600}
    finally:
        os.umask(before)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
