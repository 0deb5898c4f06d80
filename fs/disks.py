"""Where disks are kept: one directory each, made beside and renamed, so that it is whole or absent.

    STATE_DIR/disks/UUID/data         raw: the disk; overlay: the blocks that were written
    STATE_DIR/disks/UUID/bitmap       overlays only: which blocks those are
    STATE_DIR/stage/disk-UUID/        a disk that is being made or removed
    RUN_DIR/live/UUID.bitmap          overlays that have been opened since the host booted

What must be synced before a new disk may be promised: its files, their directory, then, after the
rename, `disks/`. That is three calls, one more for an overlay. `stage/` needs none: what a crash
brings back there is swept. A journalling file system commits all of it with the first call, and
one commit serves all disks that are made at the same time, so make them in parallel threads.
"""

import os
import re
import shutil
import threading
from collections.abc import Callable, Collection
from pathlib import Path

from stratocache.cache.errors import InvalidInput, NotFound
from stratocache.cache.space import full_disk_is_no_space
from stratocache.fs import reflink
from stratocache.fs.overlay import BlockSource, Overlay
from stratocache.fs.records import DiskForm
from stratocache.fs.storage import FILES
from stratocache.fs.template import ChunkedImage, Templates

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
_STAGED = "disk-"
_LIVE_SUFFIX = ".bitmap"
_DIRECTORY_MODE = 0o700


class DiskStore:
    """The disks of one state directory. Methods block and may run in any thread.

    One thread at a time may work on one disk. All raise `InvalidInput` (`uuid-invalid`) for what
    is not a version 4 UUID in lower case.
    """

    def __init__(self, state_dir: Path, run_dir: Path) -> None:
        self._state_dir = state_dir
        self._disks = state_dir / "disks"
        self._stage = state_dir / "stage"
        self._live = run_dir / "live"
        for directory in (self._disks, self._stage, self._live):
            directory.mkdir(mode=_DIRECTORY_MODE, parents=True, exist_ok=True)
        FILES.sync_directory(state_dir)
        self._templates = Templates(self._stage)
        self._probing = threading.Lock()
        self._reflinks: bool | None = None

    def create_blank(self, uuid: str, size_bytes: int) -> DiskForm:
        """Make a disk of zeros that takes no space yet, durably; asked again it changes nothing.

        Raises `NoSpace` (`no-space`).
        """
        return self._create(uuid, lambda directory: self._fill_blank(directory, size_bytes))

    def create_clone(self, uuid: str, size_bytes: int, image: ChunkedImage) -> DiskForm:
        """Make a disk that begins as a copy of an image, durably; asked again it changes nothing.

        The disk shares the extents of the chunk files where the file system can do that and is
        then complete ("raw"); else it is an overlay, which needs the image as long as it lives.
        Raises `InvalidInput` (`disk-too-small`), `NoSpace`, and `NotVerified` as `open_chunk` does.
        """
        if size_bytes < image.size_bytes:
            raise InvalidInput(
                "disk-too-small",
                f"The image has {image.size_bytes} bytes; make the disk at least that large.",
                field="size_bytes",
            )
        if self.reflink_supported():
            try:
                return self._create(uuid, lambda new: self._fill_reflinked(new, size_bytes, image))
            except OSError as error:
                if not reflink.is_unsupported(error):
                    raise
        return self._create(uuid, lambda directory: self._fill_overlay(directory, size_bytes))

    def _create(self, uuid: str, fill: Callable[[Path], DiskForm]) -> DiskForm:
        directory = self.overlay_directory(uuid)
        staged = self._stage / f"{_STAGED}{uuid}"
        form = self.form(uuid)
        if form is None:
            shutil.rmtree(staged, ignore_errors=True)
            try:
                with full_disk_is_no_space(self._state_dir):
                    staged.mkdir(mode=_DIRECTORY_MODE)
                    form = fill(staged)
                    staged.rename(directory)
            except BaseException:
                shutil.rmtree(staged, ignore_errors=True)
                raise
        FILES.sync_directory(self._disks)
        return form

    def _fill_blank(self, directory: Path, size_bytes: int) -> DiskForm:
        FILES.create_file(directory / "data", size_bytes, b"", reserve=False)
        FILES.sync_directory(directory)
        return "raw"

    def _fill_overlay(self, directory: Path, size_bytes: int) -> DiskForm:
        Overlay.create(directory, size_bytes)
        return "overlay"

    def _fill_reflinked(self, directory: Path, size_bytes: int, image: ChunkedImage) -> DiskForm:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        target = os.open(directory / "data", flags, 0o600)
        try:
            self._templates.clone(image, target)
            os.ftruncate(target, size_bytes)
            os.fsync(target)
        finally:
            os.close(target)
        FILES.sync_directory(directory)
        return "raw"

    def forget_image(self, image: ChunkedImage) -> None:
        """Let go of what is kept of an image for its next clone; call it before its files go."""
        self._templates.forget(image)

    def form(self, uuid: str) -> DiskForm | None:
        """Return the form of a disk, or None when there is no such disk."""
        directory = self.overlay_directory(uuid)
        if not (directory / "data").exists():
            return None
        return "overlay" if (directory / "bitmap").exists() else "raw"

    def delete(self, uuid: str) -> None:
        """Remove a disk that nobody has open; no disk is no error.

        Not synced: a disk that power loss brings back belongs to no row and is swept.
        """
        staged = self._stage / f"{_STAGED}{uuid}"
        directory = self.overlay_directory(uuid)
        if directory.exists():
            _remove(staged)
            directory.rename(staged)
        _remove(staged)
        self._remove_live(uuid)

    def sweep(self, keep: Collection[str]) -> list[str]:
        """Remove whatever belongs to disks other than `keep`; return their names, sorted.

        Must not run beside a `create_*` or `delete` of a disk that is not in `keep`.
        """
        found = {path.name for path in self._disks.iterdir()}
        found |= {path.name.removeprefix(_STAGED) for path in self._stage.glob(f"{_STAGED}*")}
        found |= {path.name.partition(".")[0] for path in self._live.glob(f"*{_LIVE_SUFFIX}*")}
        unknown = sorted(found - set(keep))
        for name in unknown:
            if _UUID.fullmatch(name):
                self.delete(name)
        return [name for name in unknown if _UUID.fullmatch(name)]

    def _remove_live(self, uuid: str) -> None:
        for path in self._live.glob(f"{uuid}{_LIVE_SUFFIX}*"):
            path.unlink(missing_ok=True)

    def overlay_directory(self, uuid: str) -> Path:
        """Return where a disk's files are, or would be."""
        if not _UUID.fullmatch(uuid):
            raise InvalidInput(
                "uuid-invalid", f"{uuid[:80]!r} is not the UUID of a disk.", field="uuid"
            )
        return self._disks / uuid

    def data_path(self, uuid: str) -> Path:
        """Return the file that is a raw disk, or holds the written blocks of an overlay."""
        return self.overlay_directory(uuid) / "data"

    def live_path(self, uuid: str) -> Path:
        """Return where the live bitmap of an overlay is, or would be."""
        return self._live / (self.overlay_directory(uuid).name + _LIVE_SUFFIX)

    def open_overlay(self, uuid: str, size_bytes: int, base: BlockSource) -> Overlay:
        """Open an overlay disk; raises what `Overlay` raises, and `NotFound` (`disk-unknown`)."""
        try:
            return Overlay(self.overlay_directory(uuid), self.live_path(uuid), size_bytes, base)
        except FileNotFoundError as error:
            raise NotFound(
                "disk-unknown", f"The files of disk {uuid} are missing ({error.filename})."
            ) from error

    def allocated_bytes(self, uuid: str) -> int:
        """Return the space that a disk's files take; extents shared with others are counted too."""
        with os.scandir(self.overlay_directory(uuid)) as entries:
            return sum(entry.stat(follow_symlinks=False).st_blocks * 512 for entry in entries)

    def reflink_supported(self) -> bool:
        """Tell whether disks can share extents with chunk files; tried once, on real files."""
        with self._probing:
            if self._reflinks is None:
                chunks = self._state_dir / "chunks"
                source = chunks if chunks.is_dir() else self._stage
                self._reflinks = reflink.supported(source, self._stage)
            return self._reflinks


def _remove(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)
