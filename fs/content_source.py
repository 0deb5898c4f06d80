"""Reading a whole disk at rest, or a snapshot: its bytes in order, and a validator for them."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from stratocache.cache import seals
from stratocache.cache.chunk_file import read_chunk
from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.cache.configuration import Configuration
from stratocache.cache.errors import Conflict, NotVerified
from stratocache.cache.manifest import Manifest
from stratocache.fs import raw_snapshots
from stratocache.fs.records import Disk, Snapshot
from stratocache.fs.sparse_file import extents
from stratocache.fs.storage import OpenFile

PIECE_BYTES = 1024**2

_ZERO_PIECE = bytes(PIECE_BYTES)
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Source(Protocol):
    """Bytes that do not change while they are read. Belongs to one thread at a time."""

    @property
    def size_bytes(self) -> int:
        """How many there are."""

    def pieces(self, start: int, end: int) -> Iterator[bytes]:
        """Yield the bytes of `[start, end)`, at most `PIECE_BYTES` at a time.

        Raises `OSError` and `NotVerified`.
        """

    def close(self) -> None:
        """Let go of them."""


class FileSource:
    """The bytes of one file; its holes are not read."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.path = path
        self.size_bytes = size_bytes
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def pieces(self, start: int, end: int) -> Iterator[bytes]:
        """Yield bytes; zeros stand for holes."""
        file = OpenFile(self._descriptor)
        for first, last, has_data in extents(self._descriptor, start, end):
            for offset in range(first, last, PIECE_BYTES):
                length = min(PIECE_BYTES, last - offset)
                yield file.pread(length, offset) if has_data else _zeros(length)

    def close(self) -> None:
        """Close the file, once: its number may be another file's afterwards."""
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)


class ManifestSource:
    """The bytes of a manifest; each chunk is verified, and zeros are not read.

    Reads the chunk files, as the chunk store belongs to `blockd`. What they lack, or have damaged, is
    read through an image that has it, `served` in a folder: so `blockd` fetches or repairs it.
    """

    def __init__(self, state_dir: Path, name: str, size_bytes: int, served: Path) -> None:
        try:
            self._manifest = seals.read_manifest(state_dir, name, image_bytes_max=size_bytes)
        except FileNotFoundError:
            raise NotVerified("manifest-missing", f"The manifest {name} is missing.") from None
        self._state_dir = state_dir
        self._served = served
        self._image: tuple[str, Manifest] | None = None
        self.size_bytes = self._manifest.size_bytes

    def pieces(self, start: int, end: int) -> Iterator[bytes]:
        """Yield bytes; raises `NotVerified` (`chunk-missing`, `chunk-corrupt`)."""
        while start < end:
            index, skipped = divmod(start, CHUNK_BYTES)
            last = min(end, start - skipped + CHUNK_BYTES)
            if self._manifest.is_zero(index):
                yield _zeros(last - start)
            else:
                yield self._chunk(self._manifest.digest(index))[skipped : skipped + last - start]
            start = last

    def _chunk(self, digest: bytes) -> bytes:
        try:
            return read_chunk(self._state_dir, digest)
        except NotVerified as error:
            code, fault = error.code, error.code.removeprefix("chunk-")
        except OSError as error:
            code, fault = "chunk-corrupt", f"damaged ({error.strerror})"
        found = self._chunk_of_image(digest)
        if found is None:
            raise NotVerified(
                code,
                f"Chunk {digest.hex()} is {fault}, and no image gives it; see `stratocache cache status`.",
            )
        return found

    def _chunk_of_image(self, digest: bytes) -> bytes | None:
        """Read a chunk through an image that has it, which waits until it is here."""
        for name in self._images():
            try:
                index = self._place(name, digest)
                if index is None:
                    continue
                with (self._served / name).open("rb", buffering=0) as file:
                    data = os.pread(file.fileno(), CHUNK_BYTES, index * CHUNK_BYTES)
            except (OSError, NotVerified):
                continue  # another image may have it
            if hashlib.sha256(data).digest() == digest:
                return data
        return None

    def _images(self) -> list[str]:
        """Return the images that are served, the one first that had a chunk before."""
        before = self._image[0] if self._image is not None else None
        try:
            return sorted(os.listdir(self._served), key=lambda name: name != before)
        except OSError:
            return []  # nobody serves any

    def _place(self, name: str, digest: bytes) -> int | None:
        """Return which chunk of an image has a digest."""
        if self._image is None or self._image[0] != name:
            self._image = name, seals.read_manifest(self._state_dir, name)
        return self._image[1].index_of(digest)

    def close(self) -> None:
        """Do nothing: no file is open."""


def sha256_of(source: Source) -> bytes:
    """Return the digest of all bytes."""
    hasher = hashlib.sha256()
    for piece in source.pieces(0, source.size_bytes):
        hasher.update(piece)
    return hasher.digest()


def _zeros(length: int) -> bytes:
    return _ZERO_PIECE if length == PIECE_BYTES else bytes(length)


def open_snapshot(configuration: Configuration, snapshot: Snapshot) -> Source:
    """Open a snapshot; raises `Conflict` (`snapshot-busy`) while there is nothing to read."""
    if snapshot.state != "available":
        raise Conflict(
            "snapshot-busy",
            f"Snapshot {snapshot.id} is {snapshot.state}; try again when it is available.",
        )
    path = snapshot_path(configuration.state_dir, snapshot)
    if snapshot.form == "file":
        return FileSource(path, snapshot.size_bytes)
    return ManifestSource(
        configuration.state_dir, snapshot.id, snapshot.size_bytes, configuration.blocks / "images"
    )


def snapshot_path(state_dir: Path, snapshot: Snapshot) -> Path:
    """Return the file that a snapshot is: its bytes, or its manifest."""
    if snapshot.form == "file":
        return raw_snapshots.path(state_dir / "disks" / snapshot.disk_uuid, snapshot.id)
    return state_dir / "manifests" / f"{snapshot.id}.caibx"


def open_disk(configuration: Configuration, disk: Disk) -> FileSource:
    """Open a disk: its own file when raw, `blockd`'s when an overlay."""
    if disk.form == "raw":
        path = configuration.state_dir / "disks" / disk.uuid / "data"
    else:
        path = configuration.blocks / "disks" / disk.uuid
    return FileSource(path, disk.size_bytes)


def disk_tag(configuration: Configuration, disk: Disk) -> str:
    """Return an opaque tag that changes whenever the bytes of a disk at rest may have changed.

    Made of what the disk consists of and when each of its data files was last written. It changes
    with the boot of the host too, as power loss takes back what was not flushed.
    """
    directory = configuration.state_dir / "disks" / disk.uuid
    facts = [
        _BOOT_ID.read_text(),
        disk.uuid,
        str(disk.size_bytes),
        f"{disk.form} {disk.base_image}",
    ]
    with os.scandir(directory) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            # bitmaps say what the data files hold, and are written when nothing changes
            if entry.name.endswith(("data", ".json")):
                status = entry.stat(follow_symlinks=False)
                facts.append(f"{entry.name} {status.st_ino} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32]
