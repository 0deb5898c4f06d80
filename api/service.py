"""What every resource uses: configuration, state database, and waiting for operations."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import cast

from stratocache.api.problem import FailedOperation
from stratocache.cache.configuration import Configuration
from stratocache.cache.errors import ErrorRecord, Unreachable, from_record
from stratocache.cache.structured_log import ON_BEHALF
from stratocache.fs.operation_watch import OperationWatch
from stratocache.fs.poke import poke
from stratocache.fs.records import Operation
from stratocache.fs.sharing import Sharing
from stratocache.fs.space_meter import SpaceMeter
from stratocache.fs.state import Database

_UNRESERVED_WAIT_S = 2.0
"""How long a request may wait when long waits hold as many threads as they may."""
_RESERVED_THREADS = 4
"""Threads of a worker that long waits leave alone."""
_STREAM_SHARE = 4
"""Streams take at most one thread of so many."""


class Service:
    """One worker's view of the daemon."""

    def __init__(
        self,
        configuration: Configuration,
        db: Database,
        is_ending: Callable[[], bool] = lambda: False,
    ) -> None:
        self.configuration = configuration
        self.db = db
        self.is_ending = is_ending
        """Whether this worker has been told to stop."""
        self.sharing = Sharing(configuration.state_dir)
        self.space = SpaceMeter(configuration, db)
        self._watch = OperationWatch(db, is_ending)
        self._long_waits = threading.BoundedSemaphore(
            max(1, configuration.api.threads - _RESERVED_THREADS)
        )
        self._streams = threading.BoundedSemaphore(
            max(1, configuration.api.threads // _STREAM_SHARE)
        )

    def wake(self) -> None:
        """Tell `blockd` that something is to be looked at sooner than it thinks."""
        poke(self.configuration.poke_socket)

    def start(self, operation: Operation, wait_s: float) -> Operation:
        """Tell `blockd` of a new operation and wait for its end, `wait_s` seconds at most."""
        ON_BEHALF.set(replace(ON_BEHALF.get(), operation_id=operation.id))
        if not operation.finished:
            poke(self.configuration.poke_socket)
        return self.wait(operation, wait_s)

    def wait(self, operation: Operation, wait_s: float) -> Operation:
        """Return the operation when it has ended, or as it stands when the time is over.

        Long waits never take a worker's last threads: beyond that a wait is cut short, which the
        client sees as an operation that is not done yet.
        """
        if operation.finished or wait_s == 0:
            return operation
        with self._slot() as reserved:
            timeout_s = wait_s if reserved else min(wait_s, _UNRESERVED_WAIT_S)
            return self._watch.wait(operation.id, timeout_s)

    @contextmanager
    def transfer(self) -> Iterator[None]:
        """Take a thread for a long transfer; raises `Unreachable` (`server-busy`)."""
        with self._slot() as reserved:
            if not reserved:
                raise Unreachable(
                    "server-busy", "Too many transfers are under way; try again in a moment."
                )
            yield

    def stream(self) -> Callable[[], None]:
        """Take a thread for a stream; return what gives it back, which may be called twice.

        Raises `Unreachable` (`server-busy`).
        """
        held = ExitStack()
        for places in (self._streams, self._long_waits):
            if not places.acquire(blocking=False):
                held.close()
                raise Unreachable(
                    "server-busy", "Too many streams are open; close some, or ask for pages."
                )
            held.callback(places.release)
        return held.close

    @contextmanager
    def _slot(self) -> Iterator[bool]:
        reserved = self._long_waits.acquire(blocking=False)
        try:
            yield reserved
        finally:
            if reserved:
                self._long_waits.release()


def require_success(operation: Operation) -> None:
    """Raise `FailedOperation` with the recorded error when the operation failed or was cancelled."""
    if operation.state in ("failed", "cancelled"):
        record = cast(ErrorRecord, operation.error or {})
        raise FailedOperation(operation.id, from_record(record))
