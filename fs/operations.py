"""Runs the operations that take long: fetches, launches and clones of references.

Each open operation has one task. A task that process death interrupts is started again from its
row, so every step asks first what has been done already. A launch's or clone's task ends when it
has recorded the rows it wants; the reconciler makes these real and ends the operation. Launches and
clones of images that are here need no task: all that come together are recorded together.
"""

import json
import logging
import sqlite3
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Protocol, TypeVar

import trio

from stratocache.cache.errors import (
    Cancelled,
    Conflict,
    Internal,
    StratocacheError,
)
from stratocache.cache.structured_log import ON_BEHALF, OnBehalf
from stratocache.fs import records
from stratocache.fs.acquisition import Acquisition, Report
from stratocache.fs.cache_savings import count_savings
from stratocache.fs.launch_rows import (
    PROMPT_KINDS,
    insert_clone,
    insert_launch,
    launch_request,
    record_cached,
)
from stratocache.fs.operation_ends import fail, finish, undo_launch
from stratocache.fs.pace import Pace
from stratocache.fs.records import DiskRequest, Image, LaunchRequest, Operation
from stratocache.fs.state import Database, now

log = logging.getLogger(__name__)

_T = TypeVar("_T")

_PROGRESS_INTERVAL_S = 0.5

# Operations that still need a task: some until they end, the others until their rows are there.
_NEEDING_A_TASK = """
    SELECT * FROM operations WHERE state IN ('pending', 'running') AND (
        kind IN (SELECT value FROM json_each(?))
        OR kind = 'launch' AND EXISTS (
            SELECT 1 FROM launches WHERE operation_id = operations.id AND state = 'preparing'
            AND (cancel_requested OR boot_disk IS NULL))
        OR kind = 'create-disk' AND json_extract(request, '$.reference') IS NOT NULL
        AND NOT EXISTS (SELECT 1 FROM disks WHERE uuid = operations.subject)
    ) ORDER BY created_at
"""


class Performer(Protocol):
    """What performs the operations of one kind."""

    async def perform(self, operation: Operation, report: Report) -> None:
        """Do all of an operation and end its row, or raise; the process may have died within it
        before."""


class Operations:
    """Keeps one task per open operation in `nursery`; `wake` tells the reconciler to look.

    `performers` has what performs kinds that this module does not know, by kind.
    """

    def __init__(
        self,
        db: Database,
        acquisition: Acquisition,
        nursery: trio.Nursery,
        wake: Callable[[], None],
        performers: Mapping[str, Performer] | None = None,
    ) -> None:
        self._db = db
        self._performers = dict(performers or {})
        self._kinds = json.dumps(["fetch", *self._performers])
        self._acquisition = acquisition
        self._nursery = nursery
        self._wake = wake
        self._tasks: dict[str, trio.CancelScope] = {}

    async def look(self) -> None:
        """Record what is wanted of images that are here, start tasks for operations that need one,
        cancel those that are to stop."""
        rows = self._db.rows(_NEEDING_A_TASK, self._kinds)
        fresh = []
        for row in rows:
            operation = records.operation_from(row)
            if operation.id not in self._tasks:
                fresh.append(operation)
            elif operation.cancel_requested:
                self._tasks[operation.id].cancel()
        recorded = await self._record_cached(fresh)
        for operation in fresh:
            if operation.id in recorded and operation.kind == "launch":
                self._acquisition.note_launch(operation.request["reference"])
            elif operation.id not in recorded:
                scope = self._tasks[operation.id] = trio.CancelScope()
                self._nursery.start_soon(self._run, operation, scope)
                if operation.cancel_requested:
                    scope.cancel()

    async def _record_cached(self, operations: list[Operation]) -> set[str]:
        """Record launches and clones of images that are here; return the ids of those."""
        prompt = [
            operation
            for operation in operations
            if operation.kind in PROMPT_KINDS and not operation.cancel_requested
        ]
        if not prompt:
            return set()
        try:
            return await trio.to_thread.run_sync(
                record_cached, self._db, prompt, self._acquisition.cached, self._record_failure
            )
        except Exception:
            log.exception("recording %d operations together failed", len(prompt))
            return set()

    async def _run(self, operation: Operation, scope: trio.CancelScope) -> None:
        ON_BEHALF.set(OnBehalf(operation.request_id or "", operation.id))  # of this task
        log.info("%s of %s for %s begins", operation.kind, operation.subject, operation.owner)
        error: StratocacheError | None = None
        try:
            with scope:
                await trio.to_thread.run_sync(self._mark_running, operation.id)
                await self._perform(operation)
            if scope.cancelled_caught:
                error = Cancelled("cancelled", f"The {operation.kind} was cancelled.")
        except StratocacheError as refusal:
            error = refusal
        except Exception as bug:
            log.exception("operation %s (%s) failed", operation.id, operation.kind)
            error = Internal("internal", f"The {operation.kind} failed: {bug!r}.")
        outcome = "has done its part" if error is None else f"{error.code}: {error.message}"
        log.info("%s of %s: %s", operation.kind, operation.subject, outcome)
        with trio.CancelScope(shield=True):
            if error is not None:
                await trio.to_thread.run_sync(self.record_failure, operation, error)
            await trio.to_thread.run_sync(self._acquisition.tidy)
        del self._tasks[operation.id]
        self._wake()

    async def _perform(self, operation: Operation) -> None:
        performer = self._performers.get(operation.kind)
        if performer is not None:
            await self._reporting(operation, lambda report: performer.perform(operation, report))
        elif operation.kind == "fetch":
            await self._fetch(operation)
        elif operation.kind == "launch":
            await self._launch(operation)
        else:
            await self._clone(operation)

    async def _fetch(self, operation: Operation) -> None:
        with self._acquisition.holding() as hold:
            image = await self._acquire(
                operation, operation.request["reference"], hold, complete=True
            )
            await trio.to_thread.run_sync(self._end_fetch, operation, image)

    def _end_fetch(self, operation: Operation, image: Image) -> None:
        with self._db.transaction() as connection:
            connection.execute("UPDATE images SET last_used_at = ? WHERE id = ?", (now(), image.id))
            count_savings(connection, operation, image)
            if operation.request["pin"]:
                connection.execute("UPDATE images SET pinned = 1 WHERE id = ?", (image.id,))
            finish(connection, "fetch", operation.subject, {"image": image.id}, operation.id)

    async def _launch(self, operation: Operation) -> None:
        request = launch_request(operation)

        async def try_once(hold: set[str]) -> None:
            images = [
                await self._acquire(operation, reference, hold, provisional=request.provisional)
                for reference in (request.reference, *request.readonly)
            ]
            self._acquisition.note_launch(request.reference)
            boot, *shared = images
            await trio.to_thread.run_sync(self.record_launch, operation, request, boot, shared)

        await self._unless_evicted(try_once)

    async def _clone(self, operation: Operation) -> None:
        request = DiskRequest(**operation.request)
        reference = request.reference
        assert reference is not None  # a blank disk's row is made with its operation

        async def try_once(hold: set[str]) -> None:
            image = await self._acquire(operation, reference, hold)
            await trio.to_thread.run_sync(self._record_clone, operation, request, image)

        await self._unless_evicted(try_once)

    async def _unless_evicted(self, use: Callable[[set[str]], Awaitable[None]]) -> None:
        """Acquire and use images; once more when one went after it was found here.

        From then on it is held, so it cannot go again.
        """
        with self._acquisition.holding() as hold:
            try:
                await use(hold)
            except Conflict as conflict:
                if conflict.code != "image-busy":
                    raise
                await use(hold)

    def _record_clone(self, operation: Operation, request: DiskRequest, image: Image) -> None:
        with self._db.transaction() as connection:
            insert_clone(connection, operation, request, image)

    def record_launch(
        self, operation: Operation, request: LaunchRequest, boot: Image, shared: list[Image]
    ) -> None:
        """Record the disk and the attachments that a launch wants; done once, however often run.

        Raises what the intents of disks and attachments raise, and `Conflict` (`image-busy`).
        """
        with self._db.transaction() as connection:
            insert_launch(connection, self._db, operation, request, boot, shared)

    async def _acquire(
        self,
        operation: Operation,
        reference: str,
        hold: set[str],
        *,
        complete: bool = False,
        provisional: bool = False,
    ) -> Image:
        """Acquire an image while its progress is written to the operation's row."""
        acquire = partial(
            self._acquisition.acquire, reference, hold=hold, complete=complete,
            provisional=provisional,
        )  # fmt: skip
        return await self._reporting(operation, lambda report: acquire(report=report))

    async def _reporting(self, operation: Operation, work: Callable[[Report], Awaitable[_T]]) -> _T:
        """Do some work while its progress is written to the operation's row."""
        latest: tuple[int, int | None] = (0, None)

        def report(done_bytes: int, total_bytes: int | None) -> None:
            nonlocal latest
            latest = (done_bytes, total_bytes)

        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write_progress, operation.id, lambda: latest)
            try:
                result = await work(report)
            except Exception as error:  # noqa: BLE001 -- raised below, outside the nursery
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return result

    async def _write_progress(
        self, operation_id: str, latest: Callable[[], tuple[int, int | None]]
    ) -> None:
        written: tuple[int, int | None, float] = (0, None, 0.0)
        pace = Pace(trio.current_time(), latest()[0])
        while True:
            await trio.sleep(_PROGRESS_INTERVAL_S)
            pace.done_bytes, total_bytes = latest()
            progress = (pace.done_bytes, total_bytes, pace.measure(trio.current_time()))
            if progress != written:
                written = progress
                await trio.to_thread.run_sync(self._store_progress, operation_id, *progress)

    def _store_progress(
        self, operation_id: str, done_bytes: int, total_bytes: int | None, rate_bytes_s: float
    ) -> None:
        with self._db.transaction() as connection:
            connection.execute(
                "UPDATE operations SET progress_bytes = ?, total_bytes = ?, rate_bytes_s = ?, "
                "updated_at = ? WHERE id = ?",
                (done_bytes, total_bytes, rate_bytes_s, now(), operation_id),
            )

    def _mark_running(self, operation_id: str) -> None:
        with self._db.transaction() as connection:
            connection.execute(
                "UPDATE operations SET state = 'running', updated_at = ? "
                "WHERE id = ? AND state = 'pending'",
                (now(), operation_id),
            )

    def record_failure(self, operation: Operation, error: StratocacheError) -> None:
        """End an operation by an error; a launch ends when what it had recorded is gone."""
        with self._db.transaction() as connection:
            self._record_failure(connection, operation, error)

    def _record_failure(
        self, connection: sqlite3.Connection, operation: Operation, error: StratocacheError
    ) -> None:
        if operation.kind == "launch":
            undo_launch(connection, self._db, operation.subject, error)
        else:
            fail(connection, operation.kind, operation.subject, error, operation.id)
