"""What every resource uses: configuration, state database, and waiting for operations."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

from stratocache.api.places import Kind, Places
from stratocache.api.problem import FailedOperation
from stratocache.cache.configuration import ApiSettings, Configuration
from stratocache.cache.errors import ErrorRecord, from_record
from stratocache.cache.structured_log import ON_BEHALF
from stratocache.fs.operation_watch import OperationWatch
from stratocache.fs.poke import poke
from stratocache.fs.records import Caller, Operation
from stratocache.fs.sharing import Sharing
from stratocache.fs.space_meter import SpaceMeter
from stratocache.fs.state import Database

_SHORT_WAIT_S = 2.0
"""How long a request may wait when all places for long waits are taken."""
_RESERVED_THREADS = 4
"""Threads of a worker that no wait takes."""
_TRANSFERS = Kind(
    "transfers-rationed", "transfers", "let one of them end, then try again",
    wait_s=5, retry_after_s=5,
)  # fmt: skip
_STREAMS = Kind(
    "streams-rationed", "event streams", "close one, or ask for pages", wait_s=1, retry_after_s=10
)


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
        settings = configuration.api
        self._long_waits = threading.BoundedSemaphore(_long_waits(settings))
        self._short_waits = threading.BoundedSemaphore(max(1, settings.threads - _RESERVED_THREADS))
        self._transfers, self._streams = _places(settings)

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

        When all places for long waits are taken a wait is cut short, and when many are cut short
        already there is none, which the client sees as an operation that is not done yet.
        """
        if operation.finished or wait_s == 0:
            return operation
        for places, wait_max_s in (
            (self._long_waits, wait_s),
            (self._short_waits, min(wait_s, _SHORT_WAIT_S)),
        ):
            if places.acquire(blocking=False):
                try:
                    return self._watch.wait(operation.id, wait_max_s)
                finally:
                    places.release()
        return operation

    @contextmanager
    def transfer(self, caller: Caller) -> Iterator[None]:
        """Have a place for a long transfer during a block.

        Raises `HttpProblem` 429 (`transfers-rationed`) and `Unreachable` (`server-busy`).
        """
        give_back = self._transfers.take(caller.name)
        try:
            yield
        finally:
            give_back()

    def stream(self, caller: Caller) -> Callable[[], None]:
        """Take a place for a stream; return what gives it back, which may be called twice.

        Raises `HttpProblem` 429 (`streams-rationed`) and `Unreachable` (`server-busy`).
        """
        return self._streams.take(caller.name)


def threads_of_worker(settings: ApiSettings) -> int:
    """Return how many threads a worker has at most: what takes long leaves `settings.threads`."""
    places = sum(kind.threads for kind in _places(settings))
    return settings.threads + _long_waits(settings) + places


def _long_waits(settings: ApiSettings) -> int:
    return 4 * settings.threads


def _places(settings: ApiSettings) -> tuple[Places, Places]:
    """Return a worker's places for transfers and for event streams."""
    return Places(_TRANSFERS, settings.threads), Places(_STREAMS, 2 * settings.threads)


def require_success(operation: Operation) -> None:
    """Raise `FailedOperation` with the recorded error when the operation failed or was cancelled."""
    if operation.state in ("failed", "cancelled"):
        record = cast(ErrorRecord, operation.error or {})
        raise FailedOperation(operation.id, from_record(record))
