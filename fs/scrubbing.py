"""The scrubber in `blockd`: passes that begin when they are due or asked for, pause, and go on.

Its row in the state database has what it is to do and where it stands, so that a pass goes on where
the process before was.
"""

import logging
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio

from stratocache.cache.configuration import Configuration
from stratocache.cache.images import ImageStore
from stratocache.cache.repair import Repairer
from stratocache.cache.scrub import Scrub, Tally
from stratocache.fs.losses import RepairRecord
from stratocache.fs.manifests import incomplete_manifests, published_manifests
from stratocache.fs.records import Caller
from stratocache.fs.rights import require_operator
from stratocache.fs.state import Database, now, record_event

log = logging.getLogger(__name__)

_T = TypeVar("_T")

_SAVE_INTERVAL_S = 5.0
_LOOK_INTERVAL_S = 60.0
_AFTER_FAILURE_S = 60.0


@dataclass(frozen=True, slots=True)
class ScrubState:
    """What the scrubber is to do, and did."""

    paused: bool
    requested: bool
    position: str | None
    """None = no pass is under way."""
    started_at: str | None
    finished_at: str | None
    chunks: int
    chunk_bytes: int
    manifests: int
    damaged: int
    repaired: int

    @property
    def state(self) -> str:
        """One word for people: running, paused or idle."""
        if self.paused:
            return "paused"
        return "running" if self.position is not None or self.requested else "idle"


def scrub_state(db: Database) -> ScrubState:
    """Return what the scrubber is to do, and did."""
    row = db.row("SELECT * FROM scrub")
    assert row is not None
    fields = {name: value for name, value in dict(row).items() if name != "id"}
    flags = {name: bool(row[name]) for name in ("paused", "requested")}
    return ScrubState(**{**fields, **flags})


def request_scrub(db: Database, caller: Caller, action: str) -> ScrubState:
    """Ask the scrubber to begin a pass now (`now`), to `pause`, or to `resume`; twice is no error.

    Raises `Refused` (`not-allowed`).
    """
    require_operator(caller)
    change = {"now": "requested = 1, paused = 0", "pause": "paused = 1", "resume": "paused = 0"}
    with db.transaction() as connection:
        connection.execute(f"UPDATE scrub SET {change[action]}")  # nosec B608 # no value in it
    return scrub_state(db)


class Scrubbing:
    """Keeps the scrubber going; `look` tells it that its row may have changed."""

    def __init__(
        self, configuration: Configuration, db: Database, images: ImageStore,
        repairer: Repairer, record: RepairRecord,
    ) -> None:  # fmt: skip
        self._configuration = configuration
        self._db = db
        self._images = images
        self._repairer = repairer
        self._record = record
        self._scrub = Scrub(
            images,
            repairer,
            bytes_per_s=configuration.scrub.bytes_per_s,
            published=partial(published_manifests, db),
            incomplete=partial(incomplete_manifests, db),
            note=self._note,
        )
        self._limiter = trio.CapacityLimiter(1)
        self._changed = trio.Event()
        self._saved_at = 0.0

    def look(self) -> None:
        """Look at the row soon."""
        self._changed.set()

    async def run(self) -> None:
        """Make passes for ever; one that fails is taken up again a minute later."""
        while True:
            try:
                await self._wait_until_due()
                await self._pass()
            except Exception:
                log.exception("the scrubber stopped; it goes on in a while")
                await trio.sleep(_AFTER_FAILURE_S)

    async def _wait_until_due(self) -> None:
        while True:
            self._changed = trio.Event()
            state = await self._in_thread(self._state)
            if state.state == "running" or (not state.paused and self._is_due(state)):
                return
            with trio.move_on_after(_LOOK_INTERVAL_S):
                await self._changed.wait()

    def _state(self) -> ScrubState:
        return scrub_state(self._db)

    def _is_due(self, state: ScrubState) -> bool:
        if state.started_at is None:
            return True
        started = datetime.fromisoformat(state.started_at)
        return datetime.now(UTC) >= started + timedelta(
            seconds=self._configuration.scrub.interval_s
        )

    async def _pass(self) -> None:
        tally = await self._in_thread(self._begin)
        try:
            await self._scrub.walk(tally)
        finally:
            with trio.CancelScope(shield=True):
                await self._in_thread(self._save, tally)
        await self._in_thread(self._end, tally)

    def _begin(self) -> Tally:
        """Take up the pass that is under way, or begin one."""
        with self._db.transaction() as connection:
            connection.execute(
                "UPDATE scrub SET position = '', started_at = ?, chunks = 0, chunk_bytes = 0, "
                "manifests = 0, damaged = 0, repaired = 0 WHERE position IS NULL",
                (now(),),
            )
            connection.execute("UPDATE scrub SET requested = 0")
        self._repairer_forgives()
        state = scrub_state(self._db)
        return Tally(
            state.position or "", state.chunks, state.chunk_bytes, state.manifests,
            state.damaged, state.repaired,
        )  # fmt: skip

    def _repairer_forgives(self) -> None:
        trio.from_thread.run_sync(self._repairer.forgive)

    async def _note(self, tally: Tally) -> None:
        """Save the position now and then; wait as long as the scrubber is paused."""
        if trio.current_time() - self._saved_at >= _SAVE_INTERVAL_S:
            self._saved_at = trio.current_time()
            await self._in_thread(self._save, tally)
        if not self._changed.is_set():
            return
        while True:
            self._changed = trio.Event()
            state = await self._in_thread(self._state)
            if not state.paused:
                return
            await self._in_thread(self._save, tally)
            await self._changed.wait()

    def _save(self, tally: Tally) -> None:
        with self._db.transaction() as connection:
            connection.execute(
                "UPDATE scrub SET position = ?, chunks = ?, chunk_bytes = ?, manifests = ?, "
                "damaged = ?, repaired = ? WHERE position IS NOT NULL",
                (tally.position, tally.chunks, tally.chunk_bytes, tally.manifests,
                 tally.damaged, tally.repaired),
            )  # fmt: skip

    def _end(self, tally: Tally) -> None:
        self._record.forget_unneeded()
        if self._images.leftovers:  # each manifest has been read now, so most are whole
            self._images.remove_leftovers(published_manifests(self._db))
        empty_quarantine(
            self._configuration.state_dir, older_than_s=self._configuration.quarantine.period_s
        )
        with self._db.transaction() as connection:
            connection.execute("UPDATE scrub SET position = NULL, finished_at = ?", (now(),))
            record_event(
                connection, "scrub.done", "cache",
                f"{tally.chunks} chunks and {tally.manifests} manifests were read again: "
                f"{tally.damaged} damaged or missing, {tally.repaired} of them repaired.",
            )  # fmt: skip

    async def _in_thread(self, call: Callable[..., _T], *arguments: object) -> _T:
        return await trio.to_thread.run_sync(call, *arguments, limiter=self._limiter)


def empty_quarantine(state_dir: Path, *, older_than_s: float) -> int:
    """Remove what went to quarantine so long ago; return the bytes."""
    directory = state_dir / "quarantine"
    freed_bytes = 0
    for path in directory.iterdir() if directory.exists() else ():
        with suppress(FileNotFoundError):
            status = path.lstat()
            if time.time() - status.st_ctime >= older_than_s:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
                freed_bytes += status.st_size
    return freed_bytes
