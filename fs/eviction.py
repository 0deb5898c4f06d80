"""Eviction: cold images go when the cache is over its limit, the file system below its floor, or a
fetch needs room.

One transaction decides about an image: in it nothing holds the image, and its state becomes
`deleting`; a clone or an attachment is recorded in one that wants the state `verified`. So of a
launch and an eviction at the same moment exactly one comes first. The reconciler does the rest, as
for an image that somebody deletes, and does it again after a crash.
"""

import logging
import os
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import TypeVar

import trio

from stratocache.cache.chunks import ChunkStore
from stratocache.cache.configuration import Configuration
from stratocache.cache.errors import Conflict, InvalidInput, NoSpace, NotFound
from stratocache.fs import inventory
from stratocache.fs.acquisition import Report
from stratocache.fs.keep_plan import Candidate, choose, eviction_plan, why_kept
from stratocache.fs.operation_ends import finish
from stratocache.fs.operation_intents import add_operation
from stratocache.fs.records import Caller, Operation
from stratocache.fs.rights import require_operator
from stratocache.fs.scrubbing import empty_quarantine
from stratocache.fs.skeletons import boot_chunks, record_reduction
from stratocache.fs.space_plan import holding_of
from stratocache.fs.state import Database, record_event
from stratocache.fs.tallies import add_tally

log = logging.getLogger(__name__)

_T = TypeVar("_T")

EVICT = "evict"
SUBJECT = "cache"
_POLL_S = 0.02
_GOING_TIMEOUT_S = 60.0
_HELD_NAMED_MAX = 5


def request_eviction(
    db: Database, caller: Caller, *, image_id: str | None = None, size_bytes: int | None = None
) -> Operation:
    """Ask for an image to go, or for so many bytes, or (neither) for what is over the marks.

    Raises `Conflict` (`image-held`) naming what holds the image, `InvalidInput`
    (`eviction-ambiguous`), `NotFound`, `Refused`.
    """
    require_operator(caller)
    if image_id is not None and size_bytes is not None:
        raise InvalidInput("eviction-ambiguous", "Give an image or a number of bytes, not both.")
    with db.transaction() as connection:
        if image_id is not None:
            require_free(db, image_id)
        request = {"image": image_id, "size_bytes": size_bytes}
        return add_operation(connection, caller, EVICT, image_id or SUBJECT, request)


def require_free(db: Database, image_id: str, held: Collection[str] = ()) -> None:
    """Raise `Conflict` (`image-held`) when something keeps an image, `NotFound` without one."""
    reason = why_kept(holding_of(db, inventory.image(db, image_id)), held)
    if reason is not None:
        raise Conflict("image-held", f"Image {image_id} is not evicted: {reason}.")


def surplus_bytes(
    configuration: Configuration, used_bytes: int, free_bytes: int, size_bytes: int = 0
) -> int:
    """Return what has to go so that so many bytes fit: from beyond a mark to somewhat below it, so
    that one eviction is not followed by the next at once. 0 when no mark is passed."""
    settings = configuration.cache
    ratio, max_bytes = settings.hysteresis_ratio, settings.max_bytes
    over_bytes = 0
    if max_bytes and used_bytes + size_bytes > max_bytes:
        over_bytes = used_bytes + size_bytes - int(max_bytes * (1 - ratio))
    reserve_bytes = configuration.space.reserve_bytes if size_bytes else 0
    floor_bytes = max(settings.min_free_bytes, reserve_bytes)
    if floor_bytes and free_bytes < floor_bytes + size_bytes:
        wanted_bytes = int(floor_bytes * (1 + ratio)) + size_bytes
        over_bytes = max(over_bytes, wanted_bytes - free_bytes)
    return over_bytes


class Eviction:
    """Evicts the images of one host; performs operations of kind `evict`, and makes room.

    `reduce` removes the chunks of an image but for some. `held` returns the images that operations
    of this process are about to use. Its methods belong to one trio loop.
    """

    def __init__(
        self,
        configuration: Configuration,
        db: Database,
        chunks: ChunkStore,
        reduce: Callable[[str, Collection[bytes]], int],
        held: Callable[[], Collection[str]],
        wake: Callable[[], None],
    ) -> None:
        self._configuration = configuration
        self._settings = configuration.cache
        self._db = db
        self._chunks = chunks
        self._reduce = reduce
        self._held = held
        self._wake = wake
        self._one_at_a_time = trio.Lock()
        # Apart from trio's own: whoever waits for room may hold one of those threads.
        self._limiter = trio.CapacityLimiter(1)

    async def watch(self) -> None:
        """Look at the limit and the floor for ever."""
        while True:
            try:
                async with self._one_at_a_time:
                    if await self._thread(self._shortage_bytes, 0) > 0:
                        await self._free(await self._thread(self._surplus_bytes, 0))
            except Exception:
                log.exception("eviction failed; it is tried again")
            await trio.sleep(self._settings.check_interval_s)

    async def make_room(self, size_bytes: int) -> None:
        """Return when so many bytes fit; raise `NoSpace` (`no-space`) naming what holds space."""
        async with self._one_at_a_time:
            if await self._thread(self._shortage_bytes, size_bytes) <= 0:
                return
            await self._thread(_empty_quarantine, self._configuration)
            # nothing goes in vain: not for a fetch that would fail all the same
            while await self._thread(self._can_free, size_bytes):
                if not await self._free(await self._thread(self._surplus_bytes, size_bytes)):
                    break
                # images that share chunks with boot sets that stay free less than was counted
                if await self._thread(self._shortage_bytes, size_bytes) <= 0:
                    return
            if await self._thread(self._shortage_bytes, size_bytes) > 0:
                raise await self._thread(self._refusal, size_bytes)

    async def perform(self, operation: Operation, report: Report) -> None:
        """Do an eviction that was asked for; what a process that died had done counts."""
        image_id = operation.request["image"]
        wanted_bytes = operation.request["size_bytes"]
        async with self._one_at_a_time:
            if image_id is not None:
                await self._evict_one(image_id, operation)
            elif wanted_bytes is not None:
                done = inventory.operation(self._db, operation.id).progress_bytes
                await self._free(wanted_bytes - done, operation)
            else:
                await self._free(await self._thread(self._surplus_bytes, 0), operation)
        await self._thread(self._end, operation)

    def _end(self, operation: Operation) -> None:
        freed_bytes = inventory.operation(self._db, operation.id).progress_bytes
        with self._db.transaction() as connection:
            result = {"freed_bytes": freed_bytes}
            finish(connection, EVICT, operation.subject, result, operation.id)

    async def _evict_one(self, image_id: str, operation: Operation) -> None:
        plan = await self._thread(self._plan)
        for candidate in plan:
            if candidate.image.id == image_id:
                whole = replace(candidate, boot_bytes=0)  # that is what was asked for
                if not await self._evict(whole, operation):
                    await self._thread(require_free, self._db, image_id, self._held())
                return
        # it went before the process died

    async def _free(self, wanted_bytes: int, operation: Operation | None = None) -> int:
        """Evict in order until so many bytes are free, or nothing is left that may go."""
        if wanted_bytes <= 0:
            return 0
        freed_bytes = 0
        refused: set[str] = set()
        while freed_bytes < wanted_bytes:
            plan = await self._thread(self._plan, refused)
            chosen = choose(plan, wanted_bytes - freed_bytes)
            if not chosen:
                break
            for candidate in chosen:
                if await self._evict(candidate, operation):
                    freed_bytes += candidate.freed_bytes
                else:
                    refused.add(candidate.image.id)
        return freed_bytes

    def _plan(self, refused: Collection[str] = ()) -> list[Candidate]:
        held = {*trio.from_thread.run_sync(self._held), *refused}
        return eviction_plan(self._configuration, self._db, held=held)

    async def _evict(self, candidate: Candidate, operation: Operation | None) -> bool:
        """Let one image go, or go down to its boot set; tell whether it went."""
        image_id = candidate.image.id
        held = self._held()
        boot_set: dict[bytes, int] = {}
        if candidate.boot_bytes:
            boot_set = await self._thread(boot_chunks, self._configuration, candidate.image)
        if not await self._thread(self._decide, candidate, operation, held, boot_set):
            return False
        if boot_set:
            await self._thread(self._reduce, image_id, boot_set)
            return True
        self._wake()
        with trio.move_on_after(_GOING_TIMEOUT_S):
            while True:
                image = inventory.find_image(self._db, image_id)
                if image is None or image.state != "deleting":
                    return image is None
                await trio.sleep(_POLL_S)
        return False

    def _decide(
        self,
        candidate: Candidate,
        operation: Operation | None,
        held: Collection[str],
        boot_set: dict[bytes, int],
    ) -> bool:
        image_id, freed_bytes = candidate.image.id, candidate.freed_bytes
        with self._db.transaction() as connection:
            try:
                require_free(self._db, image_id, held)
            except (Conflict, NotFound):
                return False
            if not boot_set:
                connection.execute("UPDATE images SET state = 'deleting' WHERE id = ?", (image_id,))
            elif not record_reduction(connection, image_id, sum(boot_set.values())):
                return False  # it was withdrawn meanwhile
            if operation is not None:
                connection.execute(
                    "UPDATE operations SET progress_bytes = progress_bytes + ? WHERE id = ?",
                    (freed_bytes, operation.id),
                )
            add_tally(connection, "evicted_bytes", freed_bytes)
            record_event(
                connection, "image.reduced" if boot_set else "image.evicted", image_id,
                f"Image {image_id}, {_why(candidate)}, makes room: "
                f"{freed_bytes} bytes{'; what its boot reads stays' if boot_set else ''}.",
            )  # fmt: skip
        return True

    def _shortage_bytes(self, size_bytes: int) -> int:
        """Return by how much so many bytes more are too many; the floor is kept for no fetch."""
        used_bytes, free_bytes = self._measure()
        floor_bytes = self._configuration.space.reserve_bytes
        if size_bytes == 0:
            floor_bytes = self._settings.min_free_bytes
        over_bytes = size_bytes + floor_bytes - free_bytes
        if self._settings.max_bytes:
            over_bytes = max(over_bytes, used_bytes + size_bytes - self._settings.max_bytes)
        return over_bytes

    def _surplus_bytes(self, size_bytes: int) -> int:
        used_bytes, free_bytes = self._measure()
        over_bytes = surplus_bytes(self._configuration, used_bytes, free_bytes, size_bytes)
        return max(over_bytes, self._shortage_bytes(size_bytes))

    def _can_free(self, size_bytes: int) -> bool:
        freeable_bytes = sum(item.footprint.freed_bytes for item in self._plan())
        return freeable_bytes >= self._shortage_bytes(size_bytes)

    def _measure(self) -> tuple[int, int]:
        """Return the bytes of all chunks, and the free ones of the file system."""
        status = os.statvfs(self._configuration.state_dir)
        return self._chunks.statistics().size_bytes, status.f_bavail * status.f_frsize

    def _refusal(self, size_bytes: int) -> NoSpace:
        used_bytes, free_bytes = self._measure()
        kept = [
            f"image {item.image.id} ({item.kept_because})"
            for item in self._plan()
            if item.kept_because is not None
        ]
        more = f" and {len(kept) - _HELD_NAMED_MAX} more" if len(kept) > _HELD_NAMED_MAX else ""
        limit = f" of at most {self._settings.max_bytes}" if self._settings.max_bytes else ""
        return NoSpace(
            "no-space",
            f"{size_bytes} bytes do not fit: the cache has {used_bytes} bytes{limit}, {free_bytes} "
            f"are free, {self._configuration.space.reserve_bytes} of them reserved, and nothing "
            f"more can be evicted. Space is held by {', '.join(kept[:_HELD_NAMED_MAX]) or 'disks'}"
            f"{more}; unpin, detach or delete some of it, or add space.",
        )

    async def _thread(self, call: Callable[..., _T], *arguments: object) -> _T:
        return await trio.to_thread.run_sync(call, *arguments, limiter=self._limiter)


def _why(candidate: Candidate) -> str:
    if candidate.image.state == "withdrawn":
        return "which was withdrawn"
    return f"last used {candidate.last_used_at}"


def _empty_quarantine(configuration: Configuration) -> int:
    return empty_quarantine(configuration.state_dir, older_than_s=configuration.quarantine.period_s)
