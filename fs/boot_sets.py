"""Learning what a boot reads: the first reads of an image after its first launch.

From a launch on, until two minutes or 64 MiB have gone by, every chunk that is read of its image
is noted, in order, and written to `bootsets/ID` every few seconds. An image that has a boot set, its own or one
that came with it, learns nothing more.
"""

import logging
from pathlib import Path

import httpx
import trio

from stratocache.cache import bootset
from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.cache.configuration import Configuration
from stratocache.cache.entry import Entry
from stratocache.cache.errors import NotFound, NotVerified, StratocacheError
from stratocache.cache.image_reader import ImageReader
from stratocache.cache.images import ImageStore
from stratocache.cache.location import beside_index, read_location

log = logging.getLogger(__name__)

_WINDOW_S = 120.0
_WRITE_INTERVAL_S = 5.0
_CHUNKS_MAX = 64 * 1024**2 // CHUNK_BYTES


class BootSets:
    """The boot sets of one state directory; recordings run in `nursery`."""

    def __init__(
        self,
        configuration: Configuration,
        images: ImageStore,
        nursery: trio.Nursery,
        *,
        window_s: float = _WINDOW_S,
    ) -> None:
        self._settings = configuration.fetch
        self._directory = configuration.state_dir / "bootsets"
        self._images = images
        self._nursery = nursery
        self._window_s = window_s
        self._recording: dict[str, _Recording] = {}

    def path(self, image_id: str) -> Path:
        """Return where the boot set of an image is, or would be."""
        return self._directory / self._images.manifest_path(image_id).stem

    def load(self, image_id: str) -> list[int]:
        """Return the chunks of an image's boot set, none when it has none that is any use."""
        try:
            size_bytes = self._images.reader(image_id).size_bytes
            return bootset.decode(bootset.read(self.path(image_id)), size_bytes)
        except FileNotFoundError:
            return []
        except (OSError, StratocacheError) as error:
            log.warning("boot set of %s: %s", image_id, error)
            return []

    async def fetch(self, entry: Entry, client: httpx.AsyncClient) -> None:
        """Take the boot set that lies beside an entry's index, if there is one and none here."""
        url = beside_index(entry.index.url, bootset.SUFFIX) if entry.index else None
        if url is None or self.path(entry.identifier).exists():
            return
        try:
            content = await read_location(url, bootset.BYTES_MAX, client, self._settings)
            reader = await self._images.open_reader(entry.identifier)
            bootset.decode(content, reader.size_bytes)
            await trio.to_thread.run_sync(bootset.write, self.path(entry.identifier), content)
        except NotFound:
            return
        except (OSError, StratocacheError) as error:
            log.info("boot set of %s: %s", entry.identifier, error)

    def learn(self, image_id: str) -> None:
        """Begin to note what is read of an image, unless its boot set is known."""
        if image_id not in self._recording and not self.path(image_id).exists():
            recording = self._recording[image_id] = _Recording()
            self._nursery.start_soon(self._record, image_id, recording)

    async def stop_learning(self, image_id: str) -> None:
        """Write down what has been noted of an image; return when that is done."""
        recording = self._recording.get(image_id)
        if recording is not None:
            recording.full.set()
            await recording.ended.wait()

    def forget(self, image_id: str) -> None:
        """Remove the boot set of an image that goes. Blocks."""
        self.path(image_id).unlink(missing_ok=True)

    async def _record(self, image_id: str, recording: "_Recording") -> None:
        try:
            reader = await trio.to_thread.run_sync(self._images.reader, image_id)
            recording.reader = reader
            reader.trace = recording.note
            try:
                with trio.move_on_after(self._window_s):
                    while not recording.full.is_set():
                        with trio.move_on_after(_WRITE_INTERVAL_S):
                            await recording.full.wait()
                        await self._write(image_id, recording, reader.size_bytes)
            finally:
                reader.trace = None
            await self._write(image_id, recording, reader.size_bytes)
        except (OSError, NotFound, NotVerified) as error:
            log.warning("the boot set of %s is not known: %s", image_id, error)
        finally:
            del self._recording[image_id]
            recording.ended.set()

    async def _write(self, image_id: str, recording: "_Recording", size_bytes: int) -> None:
        """Write what is new; a boot set that came from elsewhere meanwhile stays."""
        path, count = self.path(image_id), len(recording.indexes)
        if count == recording.written or (not recording.written and path.exists()):
            return
        content = bootset.encode(list(recording.indexes), size_bytes)
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(bootset.write, path, content)
        recording.written = count


class _Recording:
    """The chunks that were read, in order."""

    def __init__(self) -> None:
        self.indexes: dict[int, None] = {}
        self.written = 0
        self.full = trio.Event()
        self.ended = trio.Event()
        self.reader: ImageReader | None = None

    def note(self, offset: int, size: int) -> None:
        """Note one read; the event loop calls this for each."""
        for index in range(offset // CHUNK_BYTES, (offset + size - 1) // CHUNK_BYTES + 1):
            if index in self.indexes:
                continue
            if self.reader is not None and self.reader.chunk(index) is not None:
                self.indexes[index] = None
        if len(self.indexes) >= _CHUNKS_MAX:
            self.full.set()
