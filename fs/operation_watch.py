"""Waiting for the ends of operations: of all threads that wait, one looks for all.

It polls PRAGMA data_version, which costs microseconds, and reads rows only after a commit. The
pause grows with how long nobody new has come, so that a quick end is seen at once and a long wait
costs next to nothing.
"""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from stratocache.fs import inventory, records
from stratocache.fs.records import Operation
from stratocache.fs.state import Database

_FIRST_PAUSE_S = 0.002
_LAST_PAUSE_S = 0.05
_PATIENCE = 30
"""The pause is this part of the time since the latest came."""
_ENDED = """
    SELECT * FROM operations WHERE id IN (SELECT value FROM json_each(?))
    AND state NOT IN ('pending', 'running')
"""


@dataclass(eq=False)
class _Waiter:
    """One thread that waits, woken when its operation has ended or when it is to look for all."""

    operation_id: str
    woken: threading.Event = field(default_factory=threading.Event)
    ended: Operation | None = None


class OperationWatch:
    """The ends that the threads of one process wait for."""

    def __init__(self, db: Database, is_ending: Callable[[], bool] = lambda: False) -> None:
        self._db = db
        self._is_ending = is_ending
        """Whether this process is to stop, and nobody may wait any more."""
        self._lock = threading.Lock()
        self._waiters: list[_Waiter] = []
        self._looking: _Waiter | None = None
        self._latest = 0.0

    def wait(self, operation_id: str, timeout_s: float) -> Operation:
        """Return an operation when it has ended, or as it stands after `timeout_s` seconds or when
        this process is to stop.

        Raises `NotFound` (`operation-unknown`).
        """
        mine = _Waiter(operation_id)
        deadline = time.monotonic() + timeout_s
        with self._lock:
            self._waiters.append(mine)
            self._latest = time.monotonic()
            if self._looking is None:
                self._looking = mine
        try:
            if self._looking is not mine:
                mine.woken.wait(timeout_s)
            if self._looking is mine:
                self._look(mine, deadline)
        finally:
            self._go(mine)
        return mine.ended or inventory.operation(self._db, operation_id)

    def _look(self, mine: _Waiter, deadline: float) -> None:
        """Look for all who wait until the end of one's own wait."""
        seen: tuple[int, float] | None = None
        while True:
            with self._lock:
                waiters, latest = list(self._waiters), self._latest
            # an operation may have ended before its waiter came
            state = self._db.data_version(), latest
            if state != seen:
                seen = state
                self._wake_ended(waiters)
            remaining_s = deadline - time.monotonic()
            if mine.ended is not None or remaining_s <= 0 or self._is_ending():
                return
            pause_s = (time.monotonic() - latest) / _PATIENCE
            time.sleep(min(max(_FIRST_PAUSE_S, pause_s), _LAST_PAUSE_S, remaining_s))

    def _wake_ended(self, waiters: list[_Waiter]) -> None:
        wanted = json.dumps([waiter.operation_id for waiter in waiters])
        ended = {row["id"]: records.operation_from(row) for row in self._db.rows(_ENDED, wanted)}
        for waiter in waiters:
            if waiter.operation_id in ended:
                waiter.ended = ended[waiter.operation_id]
                waiter.woken.set()

    def _go(self, mine: _Waiter) -> None:
        """Leave; who looked for all lets another do so."""
        with self._lock:
            self._waiters.remove(mine)
            if self._looking is mine:
                self._looking = next((w for w in self._waiters if w.ended is None), None)
                if self._looking is not None:
                    self._looking.woken.set()
