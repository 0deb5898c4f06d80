"""Published images: who reads them, who uses which chunk, and which chunks may go.

An image exists when its manifest does. Chunks are removed only when no manifest and no draft (an
image that is being made) names them; FETCH.md says why no race can remove one that is needed.
"""

import logging
import threading
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from weakref import WeakValueDictionary

import trio

from stratocache.cache import seals
from stratocache.cache.chunk_gate import OPENINGS_MAX, OpeningGate, Supplier
from stratocache.cache.chunks import ChunkStore
from stratocache.cache.draft import Draft
from stratocache.cache.errors import NotFound, NotVerified, StratocacheError
from stratocache.cache.growing import GrowingManifest
from stratocache.cache.image_reader import ImageReader
from stratocache.cache.manifest import Manifest, fsync_directory
from stratocache.cache.manifest_folder import ManifestFolder
from stratocache.cache.space import full_disk_is_no_space
from stratocache.cache.traffic import ReadCounts

log = logging.getLogger(__name__)

MANIFEST_FAULTS = frozenset({"manifest-invalid", "image-not-found"})
"""Codes of what `ImageStore.reader` raises when the manifest may be had again."""
_SWEEP_SHARDS = 16


class ImageStore(ManifestFolder):
    """The published images of one state directory. Methods block and may run in any thread."""

    def __init__(self, state_dir: Path, chunks: ChunkStore) -> None:
        super().__init__(state_dir)
        self.chunks = chunks
        self._gate = OpeningGate(chunks)
        self._lock = threading.Lock()
        self._drafts: list[Draft] = []
        self._growing: dict[str, GrowingManifest] = {}
        self._readers: WeakValueDictionary[str, ImageReader] = WeakValueDictionary()
        self.reads: defaultdict[str, ReadCounts] = defaultdict(ReadCounts)
        """By name of the manifest; they outlive its readers."""
        self.leftovers = False
        """Whether a removal could not tell which chunks nothing uses; `remove_leftovers` can, once
        every manifest is whole."""

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

    def grow(self, identifier: str, growing: GrowingManifest) -> None:
        """Let an image be read whose manifest is not known yet, until `publish` or `remove`."""
        with self._lock:
            self._growing[identifier] = growing

    def growing(self, identifier: str) -> GrowingManifest | None:
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
        for _ in range(OPENINGS_MAX):
            try:
                return self.reader(identifier)
            except StratocacheError as error:
                if not self._gate.supplies or error.code not in MANIFEST_FAULTS:
                    raise
            self._gate.wait_for(self._gate.supply_manifest, identifier)
        return self.reader(identifier)

    async def open_reader(self, identifier: str) -> ImageReader:
        """Do what `mended_reader` does without holding a thread while the manifest is mended."""
        for _ in range(OPENINGS_MAX):
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
        candidates = self._chunks_of(identifier)
        self._remove({identifier: candidates})

    def remove_all(self, identifiers: Collection[str]) -> None:
        """Remove images as `remove` does, with one look at what else uses their chunks; one that is
        not there is no error."""
        found: dict[str, set[bytes]] = {}
        for identifier in identifiers:
            found[identifier] = set()
            with suppress(NotFound):
                found[identifier] = self._chunks_of(identifier)
        if found:
            self._remove(found)

    def _chunks_of(self, identifier: str) -> set[bytes]:
        """Return the chunks of an image that is about to go; raises `NotFound`."""
        growing = self.growing(identifier)
        try:
            known = growing if growing is not None else self.manifest(identifier)
            return set(known.stored())
        except NotFound:
            self.leftovers = True  # its manifest may have been lost
            raise
        except NotVerified as error:
            log.warning("removing image %s without its chunks: %s", identifier, error)
            self.leftovers = True
            return set()

    def _remove(self, found: Mapping[str, set[bytes]]) -> None:
        for identifier in found:
            self._grown(identifier)
            self.manifest_path(identifier).unlink(missing_ok=True)
        fsync_directory(self._directory)
        for identifier in found:
            seals.remove(self._state_dir, identifier)
            with self._lock:
                self._readers.pop(identifier, None)
        self._remove_unused(set().union(*found.values()))

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

        Returns how many chunks went. For the start: nothing may be published meanwhile.
        """
        self.sweep_manifests()
        return self.remove_leftovers(published)

    def remove_leftovers(self, published: Collection[str] = ()) -> int:
        """Remove the chunks of no image, as `sweep` does, whatever else is done meanwhile.

        Returns how many went. Memory is a sixteenth of the digests of all images.
        """
        missing = set(published).difference(self.identifiers())
        self.leftovers = bool(missing)
        if missing:
            log.error("no chunk is removed while manifests are missing: %s", sorted(missing))
            return 0
        removed = 0
        for shard in range(_SWEEP_SHARDS):
            first_bytes = range(shard * 256 // _SWEEP_SHARDS, (shard + 1) * 256 // _SWEEP_SHARDS)
            candidates = {digest for byte in first_bytes for digest in self.chunks.digests(byte)}
            removed += self._remove_unused(candidates)
        return removed

    def _remove_unused(self, candidates: set[bytes], *, but_for: str | None = None) -> int:
        """Remove chunks that no draft uses and no manifest names, one of these aside."""
        if not candidates:
            return 0
        with self.chunks.condemned(candidates):
            # Drafts before manifests: a draft that is published meanwhile is found as a manifest.
            with self._lock:
                drafts: Collection[Draft | GrowingManifest] = (
                    *self._drafts,
                    *self._growing.values(),
                )
            for draft in drafts:
                candidates.difference_update(draft.stored())
            try:
                for identifier in {*self.identifiers(), *self._opened()} - {but_for}:
                    candidates.difference_update(self._stored(identifier))
                return self.chunks.remove(candidates)
            except NotVerified as error:
                self.leftovers = True
                log.error("no chunk is removed while a manifest is damaged: %s", error)
                return 0
            except OSError:
                self.leftovers = True
                raise

    def _opened(self) -> list[str]:
        with self._lock:
            return list(self._readers)

    def _stored(self, identifier: str) -> Iterable[bytes]:
        try:
            return self.manifest(identifier).stored()
        except NotFound:  # it went, or it was lost while somebody reads the image
            manifest = self.remembered_manifest(identifier)
            return () if manifest is None else manifest.stored()
