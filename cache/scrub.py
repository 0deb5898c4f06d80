"""The scrubber's walk: every chunk is hashed as the medium has it, every manifest read, once a pass.

Chunks go in the order of their digests, then manifests in the order of their names, so that a
position says what has been done. Chunks are hashed, a few at a time, by a process of the lowest
priority (`chunk_hasher`); only what it does not find right is looked at here.
"""

import json
import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import trio

from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.cache.errors import NotFound, NotVerified, StratocacheError
from stratocache.cache.images import ImageStore
from stratocache.cache.manifest import Manifest
from stratocache.cache.repair import Repairer

log = logging.getLogger(__name__)

_BURST_S = 0.25
"""How far the walk may be ahead of its rate."""
_BATCH_MAX = 16
_STAT_BATCH = 256
_ANSWER_BYTES_MAX = 16 * _BATCH_MAX

_T = TypeVar("_T")


@dataclass
class Tally:
    """What one pass has found so far."""

    position: str = ""
    chunks: int = 0
    chunk_bytes: int = 0
    manifests: int = 0
    damaged: int = 0
    repaired: int = 0


class Scrub:
    """Walks one image store; `note` is called after each step, and may wait or stop the walk.

    `published` returns the names of the manifests that must have a file, `incomplete` those of
    images whose chunks may be missing; both run in a thread.
    """

    def __init__(
        self,
        images: ImageStore,
        repairer: Repairer,
        *,
        bytes_per_s: int,
        published: Callable[[], set[str]],
        incomplete: Callable[[], set[str]],
        note: Callable[[Tally], Awaitable[None]],
    ) -> None:
        self._images = images
        self._repairer = repairer
        self._published = published
        self._incomplete = incomplete
        self._note = note
        self._pace = _Pace(bytes_per_s)
        self._batch = max(1, min(_BATCH_MAX, int(bytes_per_s * _BURST_S) // CHUNK_BYTES))
        self._limiter = trio.CapacityLimiter(1)

    async def walk(self, tally: Tally) -> None:
        """Go on where a tally stands, to the end."""
        async with _hasher() as hasher:
            batch: list[bytes] = []
            for first_byte in range(256):
                if tally.position > f"chunk {first_byte:02x}g":  # behind all of this byte
                    continue
                for digest in await self._read(partial(self._digests, first_byte)):
                    if f"chunk {digest.hex()}" > tally.position:
                        batch.append(digest)
                    if len(batch) == self._batch:
                        await self._look_at_chunks(batch, hasher, tally)
                        batch = []
            await self._look_at_chunks(batch, hasher, tally)
        for name in await self._read(self._names):
            if f"manifest {name}" > tally.position:
                await self._look_at_manifest(name, tally)

    def _names(self) -> list[str]:
        return sorted({*self._images.identifiers(), *self._published()})

    def _digests(self, first_byte: int) -> list[bytes]:
        return sorted(self._images.chunks.digests(first_byte))

    async def _look_at_chunks(
        self, digests: Sequence[bytes], hasher: "_Hasher", tally: Tally
    ) -> None:
        await self._pace.wait(len(digests) * CHUNK_BYTES)
        chunks = self._images.chunks
        lengths = await hasher.lengths([(str(chunks.path(one)), one.hex()) for one in digests])
        for digest, length in zip(digests, lengths, strict=True):
            if length is None:
                await self._look_at_chunk(digest, tally)
            tally.chunk_bytes += length or 0
            tally.chunks += 1
            tally.position = f"chunk {digest.hex()}"
        if digests:
            await self._note(tally)

    async def _look_at_chunk(self, digest: bytes, tally: Tally) -> None:
        try:
            tally.chunk_bytes += await self._read(partial(self._images.chunks.inspect, digest))
        except NotVerified as error:
            # one that went while we came to it is not missed: no manifest of a whole image names it
            uses = await self._read(partial(self._images.uses, digest))
            if error.code == "chunk-missing":
                incomplete = await self._read(self._incomplete)
                uses = [use for use in uses if use[0] not in incomplete]
            if uses or error.code == "chunk-corrupt":
                tally.damaged += 1
            if uses:
                name, index = uses[0]
                tally.repaired += await self._repair(
                    partial(self._repairer.supply, name, index, digest)
                )

    async def _look_at_manifest(self, name: str, tally: Tally) -> None:
        try:
            manifest = await self._read(partial(self._images.manifest, name))
            await self._read(partial(self._images.seal, name))
            await self._look_for_missing(name, manifest, tally)
        except (NotFound, NotVerified) as error:
            # one may have gone while we came to it
            if isinstance(error, NotVerified) or name in await self._read(self._published):
                tally.damaged += 1
                tally.repaired += await self._repair(partial(self._repairer.supply_manifest, name))
        tally.manifests += 1
        tally.position = f"manifest {name}"
        await self._note(tally)

    async def _look_for_missing(self, name: str, manifest: Manifest, tally: Tally) -> None:
        """Find chunks of a manifest that have no file: the walk over the files cannot."""
        for start in range(0, manifest.chunk_count, _STAT_BATCH):
            indexes = range(start, min(start + _STAT_BATCH, manifest.chunk_count))
            for index in await self._read(partial(self._missing, name, manifest, indexes)):
                tally.damaged += 1
                digest = manifest.digest(index)
                tally.repaired += await self._repair(
                    partial(self._repairer.supply, name, index, digest)
                )

    def _missing(self, name: str, manifest: Manifest, indexes: range) -> list[int]:
        missing = [
            index
            for index in indexes
            if not manifest.is_zero(index) and manifest.digest(index) not in self._images.chunks
        ]
        incomplete = self._incomplete() if missing else set()
        if name in incomplete:
            return []
        # a snapshot has chunks of images that may still be on their way
        awaited: set[bytes] = set()
        for other in incomplete:
            with suppress(NotFound, NotVerified):
                awaited.update(self._images.manifest(other).stored())
        return [index for index in missing if manifest.digest(index) not in awaited]

    async def _repair(self, repair: Callable[[], Awaitable[None]]) -> bool:
        with suppress(StratocacheError):
            await repair()
            return True
        return False  # the witness has told of it

    async def _read(self, call: Callable[[], _T]) -> _T:
        return await trio.to_thread.run_sync(call, limiter=self._limiter)


@asynccontextmanager
async def _hasher() -> AsyncIterator["_Hasher"]:
    """Have a process that hashes chunks in this block."""
    command = [sys.executable, "-m", "stratocache.cache.chunk_hasher", str(CHUNK_BYTES)]
    process = await trio.lowlevel.open_process(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield _Hasher(process.stdin, process.stdout)
    finally:
        process.kill()  # it changes nothing
        with trio.CancelScope(shield=True):
            await process.stdin.aclose()
            await process.stdout.aclose()
            await process.wait()


class _Hasher:
    """Our end of the process; without it nothing is found right."""

    def __init__(self, questions: trio.abc.SendStream, answers: trio.abc.ReceiveStream) -> None:
        self._questions = questions
        self._answers = answers

    async def lengths(self, files: Sequence[tuple[str, str]]) -> list[int | None]:
        """Return the lengths of files that have their digests, None for the others."""
        answer = b""
        try:
            await self._questions.send_all(json.dumps(files).encode() + b"\n")
            while not answer.endswith(b"\n") and len(answer) < _ANSWER_BYTES_MAX:
                received = await self._answers.receive_some()
                if not received:
                    break
                answer += received
        except trio.BrokenResourceError:
            pass
        if not answer.endswith(b"\n"):
            log.warning("the process that hashes chunks has ended; they are hashed here")
            return [None] * len(files)
        lengths: list[int | None] = json.loads(answer)
        return lengths


class _Pace:
    """Keeps a rate, without making up for time that was lost."""

    def __init__(self, bytes_per_s: int) -> None:
        self._bytes_per_s = bytes_per_s
        self._due_s = 0.0

    async def wait(self, size_bytes: int) -> None:
        now_s = trio.current_time()
        self._due_s = max(self._due_s, now_s - _BURST_S) + size_bytes / self._bytes_per_s
        await trio.sleep(max(0.0, self._due_s - now_s))
