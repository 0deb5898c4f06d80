"""Published images: manifests, who uses which chunk, and reading an image's bytes.

An image exists when its manifest does. Chunks are removed only when no manifest and no draft (an
image that is being made) names them; FETCH.md says why no race can remove one that is needed.
"""

import hashlib
import logging
import os
import re
import shutil
import threading
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol
from weakref import WeakValueDictionary

import trio

from stratocache.cache import seals
from stratocache.cache.chunks import (
    CHUNK_BYTES,
    DIGEST_BYTES,
    ChunkDescriptor,
    ChunkStore,
    zero_digest,
)
from stratocache.cache.errors import (
    InvalidInput,
    NotFound,
    NotVerified,
    StratocacheError,
    Unreachable,
)
from stratocache.cache.manifest import Manifest, fsync_directory
from stratocache.cache.space import full_disk_is_no_space
from stratocache.cache.traffic import ReadCounts

log = logging.getLogger(__name__)

_IDENTIFIER = re.compile(r"[A-Za-z0-9_-]{1,64}")
MANIFEST_FAULTS = frozenset({"manifest-invalid", "image-not-found"})
"""Codes of what `ImageStore.reader` raises when the manifest may be had again."""
UNKNOWN_DIGEST = bytes(DIGEST_BYTES)
"""In place of a digest: of a chunk that has not flowed past yet."""
_OPENINGS_MAX = 3
"""How often a chunk is mended for one read before the read fails."""
_SWEEP_SHARDS = 16
_READ_AHEAD_CHUNKS = 4
_ZERO_CHUNK = bytes(CHUNK_BYTES)


class Supplier(Protocol):
    """Brings what a manifest names and is not in the store, and manifests that are damaged or gone;
    belongs to the trio loop."""

    async def supply(self, name: str, index: int, digest: bytes) -> None:
        """Return when chunk `index` of the manifest `name` is in the store, else raise why not."""

    async def supply_manifest(self, name: str) -> None:
        """Return when the manifest `name` can be read again, else raise why not."""

    def waited(self, name: str, wait_s: float) -> None:
        """Take note that the running task waited for a chunk of the manifest `name`."""


class Growing(Protocol):
    """An image whose manifest is not known yet; see `stratocache.cache.growing`."""

    def stored(self) -> Iterable[bytes]:
        """Return the digests known so far."""

    def manifest(self) -> Manifest:
        """Return the manifest, whole once all digests are known."""

    def reader(
        self, chunks: ChunkStore, gate: "OpeningGate", name: str, counts: "ReadCounts"
    ) -> "ImageReader":
        """Return what reads it."""

    def close(self) -> None:
        """Let go of its files."""


class ImageReader:
    """Reads one published image. Shared by all who read it; made by `ImageStore.reader`.

    `read_nowait` never blocks but on the page cache and belongs to the event loop's thread; `read`
    is its asynchronous completion. Data races: none, an image never changes. A file that changes
    beneath us does: what was read from it is dropped, and the chunk is hashed again.
    """

    trace: Callable[[int, int], None] | None = None
    """Is told of every read by the event loop: offset and size."""

    def __init__(
        self, manifest: Manifest, chunks: ChunkStore, gate: "OpeningGate", name: str,
        counts: ReadCounts,
    ) -> None:  # fmt: skip
        self.counts = counts
        self._manifest = manifest
        self.name = name
        self.size_bytes = manifest.size_bytes
        self._digests = manifest.digests
        self._chunks = chunks
        self._gate = gate
        self._zero = zero_digest(CHUNK_BYTES)
        last = manifest.chunk_count - 1
        self._zero_last = last if last >= 0 and manifest.is_zero(last) else -1

    @property
    def manifest(self) -> Manifest:
        """What the image's chunks are."""
        return self._manifest

    def chunk(self, index: int) -> bytes | None:
        """Return the digest of a chunk, or None when it is all zeros and thus not stored."""
        digest = self._digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]
        if len(digest) != DIGEST_BYTES:
            raise IndexError(index)
        if digest == self._zero or index == self._zero_last:
            return None
        return digest

    def chunk_path(self, index: int) -> Path | None:
        """Return the file of a chunk, for a reflink; None for zeros. Open it with `open_chunk`
        first: that is what verifies it."""
        digest = self.chunk(index)
        return None if digest is None else self._chunks.path(digest)

    def open_chunk(self, index: int) -> ChunkDescriptor | None:
        """Return a descriptor of a verified chunk, None for zeros; blocks, while it is mended too.
        Raises `NotVerified` (`chunk-missing`, `chunk-corrupt`) and what mending raises."""
        digest = self.chunk(index)
        if digest is None:
            return None
        return self._gate.open_blocking(digest, self.name, index)

    def read_nowait(self, offset: int, size: int) -> bytes | bytearray | None:
        """Return bytes of the image, short at its end, or None when a chunk is not open yet."""
        size = min(size, self.size_bytes - offset)
        if size <= 0:
            return b""
        if self.trace is not None:
            self.trace(offset, size)
        index, start = divmod(offset, CHUNK_BYTES)
        if start + size > CHUNK_BYTES:
            return self._read_pieces_nowait(offset, size)
        digest = self.chunk(index)
        if digest is None:
            return _ZERO_CHUNK if size == CHUNK_BYTES else bytes(size)
        descriptor = self._chunks.opened(digest)
        if descriptor is None:
            return None
        if start == 0:
            self._read_ahead(index)
        data = self._pread(digest, descriptor, size, start)
        if data is not None:
            self.counts.hits += 1
            self.counts.hit_bytes += size
        return data

    def _pread(
        self, digest: bytes, descriptor: ChunkDescriptor, size: int, start: int
    ) -> bytes | None:
        """Return bytes of a chunk, None when its file is no longer what was hashed."""
        data = os.pread(descriptor, size, start)
        if len(data) == size and descriptor.is_intact():
            return data
        self._chunks.distrust(digest)
        return None

    def _read_ahead(self, index: int) -> None:
        """Ask the kernel for the chunks behind one: its own read-ahead ends with each file."""
        last = min(index + _READ_AHEAD_CHUNKS, self.manifest.chunk_count - 1)
        for ahead in range(index + 1, last + 1):
            digest = self.chunk(ahead)
            descriptor = None if digest is None else self._chunks.opened(digest)
            if descriptor is not None:
                os.posix_fadvise(descriptor, 0, CHUNK_BYTES, os.POSIX_FADV_WILLNEED)

    def _read_pieces_nowait(self, offset: int, size: int) -> bytearray | None:
        # One buffer that preadv fills, rather than pieces that a join copies again.
        data = bytearray(size)
        view = memoryview(data)
        hits = hit_bytes = 0
        for piece_offset, piece_size in _pieces(offset, size):
            index, start = divmod(piece_offset, CHUNK_BYTES)
            digest = self.chunk(index)
            if digest is not None:
                descriptor = self._chunks.opened(digest)
                if descriptor is None:
                    return None
                piece = view[piece_offset - offset :][:piece_size]
                if (
                    os.preadv(descriptor, [piece], start) != piece_size
                    or not descriptor.is_intact()
                ):
                    self._chunks.distrust(digest)
                    return None
                hits += 1
                hit_bytes += piece_size
        self.counts.hits += hits
        self.counts.hit_bytes += hit_bytes
        return data

    async def read(self, offset: int, size: int) -> bytes | bytearray:
        """Return bytes of the image, short at its end; chunks are opened and verified in a thread.

        A chunk that many ask for is opened once; one that is damaged or not here comes meanwhile,
        once. Raises `NotVerified` (`chunk-missing`, `chunk-corrupt`) and what the `Supplier` raises.
        """
        data = self.read_nowait(offset, size)
        if data is not None:
            await trio.lowlevel.checkpoint()
            return data
        size = min(size, self.size_bytes - offset)
        last = -(-(offset + size) // CHUNK_BYTES)
        fetched = await self._open_all(range(offset // CHUNK_BYTES, last))
        pieces = []
        for piece_offset, piece_size in _pieces(offset, size):
            pieces.append(await self._read_piece(piece_offset, piece_size))
            self._count(piece_offset // CHUNK_BYTES, piece_size, fetched)
        return b"".join(pieces)

    def _count(self, index: int, size_bytes: int, fetched: Collection[int]) -> None:
        """Count a read of one chunk; those that were `fetched` for it are misses."""
        if index in fetched:
            self.counts.misses += 1
            self.counts.miss_bytes += size_bytes
        elif self.chunk(index) is not None:
            self.counts.hits += 1
            self.counts.hit_bytes += size_bytes

    async def _open_all(self, indexes: range) -> set[int]:
        """Open chunks side by side; the first failure is raised bare, not in a group.

        Returns those that had to be fetched.
        """
        failures: list[Exception] = []
        fetched: set[int] = set()

        async def open_one(index: int, digest: bytes) -> None:
            try:
                await self._gate.open(digest, self.name, index, fetched)
            except (StratocacheError, OSError) as error:
                failures.append(error)

        async with trio.open_nursery() as nursery:
            for index in indexes:
                digest = self.chunk(index)
                if digest is not None:
                    nursery.start_soon(open_one, index, digest)
        if failures:
            raise failures[0]
        return fetched

    async def _read_piece(self, offset: int, size: int) -> bytes:
        index, start = divmod(offset, CHUNK_BYTES)
        digest = self.chunk(index)
        if digest is None:
            return bytes(size)
        for _ in range(_OPENINGS_MAX):
            descriptor = await self._gate.open(digest, self.name, index)
            data = await trio.to_thread.run_sync(self._pread, digest, descriptor, size, start)
            if data is not None:
                return data
        raise _unsteady(digest)

    def read_blocking(self, offset: int, size: int) -> bytes:
        """Return bytes of the image, short at its end, from any thread; opens what is not open.

        Raises as `read` does.
        """
        pieces = []
        for piece_offset, piece_size in _pieces(offset, min(size, self.size_bytes - offset)):
            pieces.append(self._read_piece_blocking(piece_offset, piece_size))
        return b"".join(pieces)

    def _read_piece_blocking(self, offset: int, size: int) -> bytes:
        index, start = divmod(offset, CHUNK_BYTES)
        digest = self.chunk(index)
        if digest is None:
            return bytes(size)
        for _ in range(_OPENINGS_MAX):
            descriptor = self._gate.open_blocking(digest, self.name, index)
            data = self._pread(digest, descriptor, size, start)
            if data is not None:
                return data
        raise _unsteady(digest)


class _Opening:
    """One chunk that is being opened."""

    def __init__(self) -> None:
        self.ended = trio.Event()
        self.remote = False
        self.error: Exception | None = None
        """Why it could not be fetched: for all who wait, as trying again would take as long."""


class OpeningGate:
    """Opens and verifies chunks in threads, each once however many tasks wait for it.

    What is missing, or was moved to quarantine, is asked of the `supplier`, if there is one; `token`
    is of the supplier's loop.
    """

    def __init__(self, chunks: ChunkStore) -> None:
        self.supplier: Supplier | None = None
        self._chunks = chunks
        self._opening: dict[bytes, _Opening] = {}
        self.token: trio.lowlevel.TrioToken | None = None
        self.coming: trio.Event | None = None
        """Set when the supplier that is expected is there; None = none is expected."""

    async def open(
        self, digest: bytes, name: str, index: int, fetched: set[int] | None = None
    ) -> ChunkDescriptor:
        """Return the descriptor of a chunk: chunk `index` of the manifest `name`, which is added to
        `fetched` when it had to be.

        Raises what `ChunkStore.open` and the supplier do.
        """
        while True:
            descriptor = self._chunks.opened(digest)
            if descriptor is not None:
                return descriptor
            opening = self._opening.get(digest)
            mine = opening is None
            if opening is None:
                opening = self._opening[digest] = _Opening()
            started = trio.current_time()
            try:
                if mine:
                    return await self._open(opening, digest, name, index)
                await opening.ended.wait()
                if opening.error is not None:
                    raise opening.error
            finally:
                if mine:
                    del self._opening[digest]
                    opening.ended.set()
                if opening.remote and fetched is not None:
                    fetched.add(index)
                if opening.remote and self.supplier is not None:
                    self.supplier.waited(name, trio.current_time() - started)

    async def _open(
        self, opening: _Opening, digest: bytes, name: str, index: int
    ) -> ChunkDescriptor:
        try:
            for _ in range(_OPENINGS_MAX):
                try:
                    return await trio.to_thread.run_sync(self._chunks.open, digest)
                except NotVerified:
                    if not self.supplies:
                        raise
                opening.remote = True
                await (await self._expected()).supply(name, index, digest)
            return await trio.to_thread.run_sync(self._chunks.open, digest)
        except (StratocacheError, OSError) as error:
            # a verdict may be about this manifest alone, and costs no time
            if opening.remote and not isinstance(error, NotVerified):
                opening.error = error
            raise

    @property
    def supplies(self) -> bool:
        """Whether there is a supplier, or one is expected."""
        return self.supplier is not None or self.coming is not None

    async def _expected(self) -> Supplier:
        if self.coming is not None:
            await self.coming.wait()
        assert self.supplier is not None
        return self.supplier

    async def supply(self, digest: bytes, name: str, index: int) -> None:
        """Let the supplier bring a chunk, as soon as it is there, and count what that takes."""
        started = trio.current_time()
        supplier = await self._expected()
        try:
            await supplier.supply(name, index, digest)
        finally:
            supplier.waited(name, trio.current_time() - started)

    async def supply_manifest(self, name: str) -> None:
        """Let the supplier bring a manifest, as soon as it is there."""
        await (await self._expected()).supply_manifest(name)

    def open_blocking(self, digest: bytes, name: str, index: int) -> ChunkDescriptor:
        """Do what `open` does, from a thread that is not the loop's."""
        for _ in range(_OPENINGS_MAX):
            try:
                return self._chunks.open(digest)
            except NotVerified:
                if not self.supplies:
                    raise
            self.wait_for(self.open, digest, name, index)
        return self._chunks.open(digest)

    def wait_for(self, mend: Callable[..., Awaitable[object]], *arguments: object) -> None:
        """Let the supplier's loop do something, and wait for it; raises what that raises."""
        try:
            trio.from_thread.run(_beside, mend, *arguments, trio_token=self.token)
        except (trio.RunFinishedError, trio.Cancelled):
            raise Unreachable("stopping", "The daemon is stopping; try again.") from None


async def _beside(mend: Callable[..., Awaitable[object]], *arguments: object) -> None:
    """Mend on behalf of a thread that waits, which must not keep others from having a thread."""
    limiter = trio.to_thread.current_default_thread_limiter()
    limiter.total_tokens += 1
    try:
        await mend(*arguments)
    finally:
        limiter.total_tokens -= 1


class Draft:
    """An image being made: chunks are added in order, then it is published or abandoned.

    `add` and the ends run in threads, one at a time.
    """

    def __init__(self, chunks: ChunkStore) -> None:
        self._chunks = chunks
        self._digests = bytearray()
        self.size_bytes = 0

    def add(self, data: Sequence[bytes]) -> None:
        """Append chunks: of `CHUNK_BYTES`, only the image's last fewer. Raises `NoSpace`."""
        stored = []
        for chunk in data:
            if not chunk or len(chunk) > CHUNK_BYTES or self.size_bytes % CHUNK_BYTES:
                raise ValueError(f"{len(chunk)} bytes do not fit at {self.size_bytes}")
            # Two bytes objects: one memcmp, which ends at the first byte that is not zero.
            zero = chunk == _ZERO_CHUNK
            digest = zero_digest(CHUNK_BYTES) if zero else hashlib.sha256(chunk).digest()
            self._digests += digest
            self.size_bytes += len(chunk)
            if not zero:
                stored.append((digest, chunk))
        # The digests are on record before the chunks are in the store: removal looks at records.
        self._chunks.put_all(stored)

    def manifest(self) -> Manifest:
        """Return the manifest of what has been added."""
        return Manifest(self.size_bytes, bytes(self._digests))

    def stored(self) -> Iterable[bytes]:
        """Return the digests added so far."""
        digests = bytes(self._digests)
        return (digests[i : i + DIGEST_BYTES] for i in range(0, len(digests), DIGEST_BYTES))


class ImageStore:
    """The published images of one state directory. Methods block and may run in any thread."""

    def __init__(self, state_dir: Path, chunks: ChunkStore) -> None:
        self.chunks = chunks
        self._state_dir = state_dir
        self._directory = state_dir / "manifests"
        self._directory.mkdir(mode=0o750, parents=True, exist_ok=True)
        self._quarantine = state_dir / "quarantine"
        self._gate = OpeningGate(chunks)
        self._lock = threading.Lock()
        self._drafts: list[Draft] = []
        self._growing: dict[str, Growing] = {}
        self._readers: WeakValueDictionary[str, ImageReader] = WeakValueDictionary()
        self.reads: defaultdict[str, ReadCounts] = defaultdict(ReadCounts)
        """By name of the manifest; they outlive its readers."""

    def manifest_path(self, identifier: str) -> Path:
        """Return where an image's manifest is, or would be.

        Raises `InvalidInput` (`identifier-invalid`) for what cannot be an identifier.
        """
        if not _IDENTIFIER.fullmatch(identifier):
            raise InvalidInput(
                "identifier-invalid",
                f"{identifier[:80]!r} is not an image identifier: letters, digits, - and _ only.",
                field="identifier",
            )
        return seals.manifest_path(self._state_dir, identifier)

    def identifiers(self) -> list[str]:
        """Return the identifiers of all published images, sorted."""
        return sorted(
            path.name.removesuffix(seals.SUFFIX)
            for path in self._directory.iterdir()
            if path.name.endswith(seals.SUFFIX) and not path.name.startswith(".")
        )

    def manifest(self, identifier: str) -> Manifest:
        """Read an image's manifest. Raises `NotFound` (`image-not-found`), `NotVerified`."""
        try:
            self.manifest_path(identifier)
            return seals.read_manifest(self._state_dir, identifier)
        except FileNotFoundError:
            raise NotFound(
                "image-not-found", f"No image {identifier} is in the cache; fetch it first."
            ) from None

    def seal(self, identifier: str) -> None:
        """Put back the seal of a manifest that is whole; one that went needs none.

        Raises `NotVerified` (`manifest-invalid`).
        """
        with suppress(FileNotFoundError):
            seals.adopt(self._state_dir, identifier)

    def reader(self, identifier: str) -> ImageReader:
        """Return the reader of an image, the same one to all who ask while any of them holds it.

        Raises as `manifest` does.
        """
        with self._lock:
            reader = self._readers.get(identifier)
            growing = self._growing.get(identifier)
        if reader is None:
            counts = self.reads[identifier]
            if growing is not None:
                made = growing.reader(self.chunks, self._gate, identifier, counts)
            else:
                made = ImageReader(
                    self.manifest(identifier), self.chunks, self._gate, identifier, counts
                )
            with self._lock:
                reader = self._readers.setdefault(identifier, made)
        return reader

    def grow(self, identifier: str, growing: Growing) -> None:
        """Let an image be read whose manifest is not known yet, until `publish` or `remove`."""
        with self._lock:
            self._growing[identifier] = growing

    def growing(self, identifier: str) -> Growing | None:
        """Return an image that grows, None for another name."""
        with self._lock:
            return self._growing.get(identifier)

    def _grown(self, identifier: str) -> None:
        with self._lock:
            growing = self._growing.pop(identifier, None)
        if growing is not None:
            growing.close()

    def expect_supplier(self) -> None:
        """Let whoever cannot read something wait for the supplier, which will be set in this loop."""
        self._gate.coming = trio.Event()
        self._gate.token = trio.lowlevel.current_trio_token()

    def set_supplier(self, supplier: Supplier) -> None:
        """Let readers ask for what cannot be read, from now on; call it in the supplier's loop."""
        self._gate.supplier = supplier
        self._gate.token = trio.lowlevel.current_trio_token()
        if self._gate.coming is not None:
            self._gate.coming.set()

    def mended_reader(self, identifier: str) -> ImageReader:
        """Return the reader of an image whose manifest may have to be mended first; blocks."""
        for _ in range(_OPENINGS_MAX):
            try:
                return self.reader(identifier)
            except StratocacheError as error:
                if not self._gate.supplies or error.code not in MANIFEST_FAULTS:
                    raise
            self._gate.wait_for(self._gate.supply_manifest, identifier)
        return self.reader(identifier)

    async def open_reader(self, identifier: str) -> ImageReader:
        """Do what `mended_reader` does without holding a thread while the manifest is mended."""
        for _ in range(_OPENINGS_MAX):
            try:
                return await trio.to_thread.run_sync(self.reader, identifier)
            except StratocacheError as error:
                if not self._gate.supplies or error.code not in MANIFEST_FAULTS:
                    raise
            await self._gate.supply_manifest(identifier)
        return await trio.to_thread.run_sync(self.reader, identifier)

    def remembered_manifest(self, identifier: str) -> Manifest | None:
        """Return the manifest that an open reader has, which was whole when it was read."""
        with self._lock:
            reader = self._readers.get(identifier)
            growing = identifier in self._growing
        return None if reader is None or growing else reader.manifest

    def copy_to_quarantine(self, identifier: str) -> None:
        """Keep a damaged manifest for whoever looks into it; absent is fine.

        It stays where it is: while a manifest cannot be read no chunk is removed.
        """
        self._quarantine.mkdir(mode=0o750, exist_ok=True)
        path = self.manifest_path(identifier)
        with suppress(FileNotFoundError):
            shutil.copyfile(path, self._quarantine / path.name)

    def uses(self, digest: bytes) -> list[tuple[str, int]]:
        """Return where a chunk is used: images by identifier, each with the first index there."""
        found = []
        for identifier in self.identifiers():
            with suppress(NotFound, NotVerified):
                index = self.manifest(identifier).index_of(digest)
                if index is not None:
                    found.append((identifier, index))
        return found

    def begin(self) -> Draft:
        """Start a draft; end it by `finish` or `abandon`."""
        draft = Draft(self.chunks)
        with self._lock:
            self._drafts.append(draft)
        return draft

    def publish(self, identifier: str, manifest: Manifest) -> None:
        """Make an image exist: chunks durable first, then its manifest. Raises `NoSpace`."""
        self.manifest_path(identifier)  # refuses what is no file name
        with full_disk_is_no_space(self._directory):
            self.chunks.sync()
            seals.write_manifest(self._state_dir, identifier, manifest)
        with self._lock:
            reader = self._readers.get(identifier)
            if reader is not None and reader.manifest != manifest:
                del self._readers[identifier]
        self._grown(identifier)

    def finish(self, draft: Draft) -> None:
        """Forget a draft whose manifest has been published."""
        with self._lock:
            self._drafts.remove(draft)

    def abandon(self, draft: Draft) -> None:
        """Forget a draft, and remove the chunks that nothing else uses."""
        self.finish(draft)
        self._remove_unused(set(draft.stored()))

    def remove(self, identifier: str) -> None:
        """Remove an image: its manifest first, then the chunks that nothing else uses.

        A crash in between leaves chunks that `sweep` removes. The caller has made sure that
        nobody reads the image. Raises `NotFound` (`image-not-found`).
        """
        growing = self.growing(identifier)
        try:
            known = growing if growing is not None else self.manifest(identifier)
            candidates = set(known.stored())
        except NotVerified as error:
            log.warning("removing image %s without its chunks: %s", identifier, error)
            candidates = set()
        self._grown(identifier)
        self.manifest_path(identifier).unlink(missing_ok=True)
        fsync_directory(self._directory)
        seals.remove(self._state_dir, identifier)
        with self._lock:
            self._readers.pop(identifier, None)
        self._remove_unused(candidates)

    def reduce(self, identifier: str, keep: Collection[bytes]) -> int:
        """Remove the chunks of an image but for some and what else uses; its manifest stays.

        Returns how many went. Raises `NotFound`, `NotVerified`.
        """
        candidates = set(self.manifest(identifier).stored()).difference(keep)
        return self._remove_unused(candidates, but_for=identifier)

    def quarantine(self, identifier: str) -> int:
        """Move the chunks of an image away that nothing else uses; its manifest stays.

        Returns how many went. Raises `NotFound`, `NotVerified`.
        """
        growing = self.growing(identifier)
        known = growing if growing is not None else self.manifest(identifier)
        candidates = set(known.stored())
        with self.chunks.condemned(candidates):
            for other in self.identifiers():
                if other != identifier:
                    candidates.difference_update(self._stored(other))
            for digest in list(candidates):
                self.chunks.quarantine(digest)
        return len(candidates)

    def sweep(self, published: Collection[str] = ()) -> int:
        """Remove what a crash left: half-written manifests and chunks of no image.

        No chunk goes while a manifest that was published is missing: it may be one of its.

        Returns how many chunks went. Memory is a sixteenth of the digests of all images.
        """
        for leftover in self._directory.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        self._sweep_seals()
        missing = set(published).difference(self.identifiers())
        if missing:
            log.error("no chunk is removed while manifests are missing: %s", sorted(missing))
            return 0
        removed = 0
        for shard in range(_SWEEP_SHARDS):
            first_bytes = range(shard * 256 // _SWEEP_SHARDS, (shard + 1) * 256 // _SWEEP_SHARDS)
            candidates = {digest for byte in first_bytes for digest in self.chunks.digests(byte)}
            removed += self._remove_unused(candidates)
        return removed

    def _sweep_seals(self) -> None:
        """Seal what an older version left without, remove seals of nothing."""
        there = set(self.identifiers())
        directory = self._state_dir / "seals"
        for path in directory.iterdir() if directory.exists() else ():
            if path.name not in there:  # a manifest that is made again has a new one
                path.unlink(missing_ok=True)
        for identifier in there:
            with suppress(NotVerified):
                self.seal(identifier)

    def _remove_unused(self, candidates: set[bytes], *, but_for: str | None = None) -> int:
        """Remove chunks that no draft uses and no manifest names, one of these aside."""
        if not candidates:
            return 0
        with self.chunks.condemned(candidates):
            # Drafts before manifests: a draft that is published meanwhile is found as a manifest.
            with self._lock:
                drafts: Collection[Draft | Growing] = (*self._drafts, *self._growing.values())
            for draft in drafts:
                candidates.difference_update(draft.stored())
            try:
                for identifier in self.identifiers():
                    if identifier != but_for:
                        candidates.difference_update(self._stored(identifier))
            except NotVerified as error:
                log.error("no chunk is removed while a manifest is damaged: %s", error)
                return 0
            return self.chunks.remove(candidates)

    def _stored(self, identifier: str) -> Iterator[bytes]:
        try:
            yield from self.manifest(identifier).stored()
        except NotFound:
            return


def _pieces(offset: int, size: int) -> Iterator[tuple[int, int]]:
    end = offset + size
    while offset < end:
        piece = min(end - offset, CHUNK_BYTES - offset % CHUNK_BYTES)
        yield offset, piece
        offset += piece


def _unsteady(digest: bytes) -> NotVerified:
    return NotVerified(
        "chunk-corrupt",
        f"The file of chunk {digest.hex()} changes again and again; see what writes to it.",
    )
