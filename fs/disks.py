"""Where disks are kept: one directory each, made beside and renamed, so that it is whole or absent.

    STATE_DIR/disks/UUID/data           a raw disk, beside the files of `layers.py` for overlays
    STATE_DIR/disks/UUID/snapshots/ID   snapshots of a raw disk that share its extents
    STATE_DIR/stage/disk-UUID/          a disk that is being made or removed
    RUN_DIR/live/UUID.N.bitmap          overlays that have been opened since the host booted

What must be synced before a new disk may be promised: its files, their directory, then, after the
rename, `disks/`. `stage/` needs none: what a crash brings back there is swept. One flush of the
medium can serve all disks that are made at the same time: clones that share extents are made and
synced together (`create_clones`); make others in parallel threads.
"""

import os
import re
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from stratocache.cache.errors import InvalidInput, NotFound, StratocacheError
from stratocache.cache.space import full_disk_is_no_space
from stratocache.fs import raw_snapshots, reflink, transitions
from stratocache.fs.clones import (
    DIRECTORY_MODE,
    STAGED,
    Clone,
    Clones,
    check_room,
    staged_directory,
)
from stratocache.fs.layers import LAYOUT, RAW, DiskFiles, Layout
from stratocache.fs.overlay import BlockSource, Overlay
from stratocache.fs.records import DiskForm
from stratocache.fs.storage import FILES
from stratocache.fs.template import ChunkedImage

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
_LIVE_SUFFIX = ".bitmap"


class DiskStore:
    """The disks of one state directory. Methods block and may run in any thread.

    One thread at a time may work on one disk. All raise `InvalidInput` (`uuid-invalid`) for what
    is not a version 4 UUID in lower case. Writes to overlays wait up to `write_wait_s` on a full
    file system; `on_full` is then called, in the loop's thread, with the disk's UUID.
    """

    def __init__(
        self,
        state_dir: Path,
        run_dir: Path,
        *,
        write_wait_s: float = 30.0,
        on_full: Callable[[str], None] = lambda uuid: None,
    ) -> None:
        self._write_wait_s = write_wait_s
        self._on_full = on_full
        self._state_dir = state_dir
        self._disks = state_dir / "disks"
        self._stage = state_dir / "stage"
        self._live = run_dir / "live"
        for directory in (self._disks, self._stage, self._live):
            directory.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
        FILES.sync_directory(state_dir)
        self._clones = Clones(state_dir, self._stage, self._disks)
        self._probing = threading.Lock()
        self._reflinks: bool | None = None

    def create_blank(self, uuid: str, size_bytes: int) -> DiskForm:
        """Make a disk of zeros that takes no space yet, durably; asked again it changes nothing.

        Raises `NoSpace` (`no-space`).
        """
        return self._create(uuid, lambda directory: self._fill_blank(directory, size_bytes))

    def create_clone(
        self,
        uuid: str,
        size_bytes: int,
        reader: ChunkedImage,
        base_name: str,
        *,
        complete: bool = True,
    ) -> DiskForm:
        """Make a disk that begins as a copy of an image, durably; asked again it changes nothing.

        The disk shares the extents of the chunk files where the file system can do that and the
        image is `complete`, and is then complete too ("raw"); else it is an overlay over the manifest `base_name`, which it needs
        as long as it lives. Raises `InvalidInput` (`disk-too-small`), `NoSpace`, and `NotVerified`
        as `open_chunk` does.
        """
        check_room(size_bytes, reader.size_bytes)
        if complete and self.reflink_supported():
            forms, failures = self.create_clones([Clone(uuid, size_bytes, reader)])
            if uuid in forms:
                return forms[uuid]
            if not _is_unsupported(failures[uuid]):
                raise failures.pop(uuid)
        return self._create(uuid, lambda new: self._fill_overlay(new, size_bytes, base_name))

    def create_clones(
        self, clones: Sequence[Clone]
    ) -> tuple[dict[str, DiskForm], dict[str, StratocacheError | OSError]]:
        """Make clones that share extents, all of them durable at the end; asked again, no change.

        Returns the form of each that is there, and what went wrong with each other one, as
        `create_clone` raises it: that can make those whose `OSError` `reflink.is_unsupported`.
        """
        forms = {clone.uuid: self.form(clone.uuid) for clone in clones}
        failures = self._clones.make([clone for clone in clones if forms[clone.uuid] is None])
        FILES.sync_directory(self._disks)
        made: dict[str, DiskForm] = {
            uuid: form or "raw" for uuid, form in forms.items() if uuid not in failures
        }
        return made, failures

    def clone_raw_snapshot(
        self, new_uuid: str, size_bytes: int, uuid: str, snapshot_id: str
    ) -> DiskForm:
        """Make a raw disk that begins as a snapshot of a raw disk; asked again it changes nothing.

        Raises `NotFound` (`snapshot-unknown`), `InvalidInput` (`disk-too-small`), `NoSpace`.
        """
        source = raw_snapshots.path(self.overlay_directory(uuid), snapshot_id)

        def fill(directory: Path) -> DiskForm:
            check_room(size_bytes, raw_snapshots.size_bytes(source))
            raw_snapshots.copy(source, directory / "data", size_bytes)
            return "raw"

        return self._create(new_uuid, fill)

    def _create(self, uuid: str, fill: Callable[[Path], DiskForm]) -> DiskForm:
        directory = self.overlay_directory(uuid)
        staged = staged_directory(self._stage, uuid)
        form = self.form(uuid)
        if form is None:
            shutil.rmtree(staged, ignore_errors=True)
            try:
                with full_disk_is_no_space(self._state_dir):
                    staged.mkdir(mode=DIRECTORY_MODE)
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

    def _fill_overlay(self, directory: Path, size_bytes: int, base_name: str) -> DiskForm:
        transitions.create(DiskFiles(directory, self._live / directory.name), size_bytes, base_name)
        return "overlay"

    def forget_image(self, image: ChunkedImage) -> None:
        """Let go of what is kept of an image for its next clone; call it before its files go."""
        self._clones.forget_image(image)

    def forget_images(self) -> None:
        """Let go of what is kept of all images: the next clones verify their chunks again."""
        self._clones.forget_images()

    def form(self, uuid: str) -> DiskForm | None:
        """Return the form of a disk, or None when there is no such disk."""
        directory = self.overlay_directory(uuid)
        if (directory / LAYOUT).exists():
            return "overlay"
        if not (directory / "data").exists():
            return None
        return "overlay" if transitions.is_first_release(self.files(uuid)) else "raw"

    def delete(self, uuid: str) -> None:
        """Remove a disk that nobody has open; no disk is no error.

        Not synced: a disk that power loss brings back belongs to no row and is swept.
        """
        staged = staged_directory(self._stage, uuid)
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
        found |= {path.name.removeprefix(STAGED) for path in self._stage.glob(f"{STAGED}*")}
        found |= {path.name.partition(".")[0] for path in self._live.glob(f"*{_LIVE_SUFFIX}*")}
        unknown = sorted(found - set(keep))
        for name in unknown:
            if _UUID.fullmatch(name):
                self.delete(name)
        return [name for name in unknown if _UUID.fullmatch(name)]

    def _remove_live(self, uuid: str) -> None:
        for path in self._live.glob(f"{uuid}.*"):
            path.unlink(missing_ok=True)

    def overlay_directory(self, uuid: str) -> Path:
        """Return where a disk's files are, or would be."""
        if not _UUID.fullmatch(uuid):
            raise InvalidInput(
                "uuid-invalid", f"{uuid[:80]!r} is not the UUID of a disk.", field="uuid"
            )
        return self._disks / uuid

    def data_path(self, uuid: str) -> Path:
        """Return the file that is a raw disk."""
        return self.overlay_directory(uuid) / "data"

    def files(self, uuid: str) -> DiskFiles:
        """Return the names of a disk's files."""
        return DiskFiles(self.overlay_directory(uuid), self._live / uuid)

    def layout(self, uuid: str) -> Layout:
        """Return what the files of an overlay mean.

        Raises `NotFound` (`disk-unknown`) for a raw disk and for none, and what reading raises.
        """
        layout = self.files(uuid).layout()
        if layout is None:
            raise NotFound("disk-unknown", f"The files of disk {uuid} are missing.")
        return layout

    def open_overlay(self, uuid: str, base_reader_of: Callable[[str], BlockSource]) -> Overlay:
        """Open an overlay disk; raises what `Overlay` raises, and `NotFound` (`disk-unknown`)."""
        try:
            return Overlay(
                self.files(uuid),
                base_reader_of,
                write_wait_s=self._write_wait_s,
                on_full=lambda: self._on_full(uuid),
            )
        except FileNotFoundError as error:
            raise NotFound(
                "disk-unknown", f"The files of disk {uuid} are missing ({error.filename})."
            ) from error

    def adopt_overlay(self, uuid: str, base_name: str) -> None:
        """Give an overlay of the first release a layout; any other disk stays as it is.

        Raises what `transitions.adopt` raises, and `NoSpace`.
        """
        with full_disk_is_no_space(self._state_dir):
            if self.overlay_directory(uuid).exists():
                transitions.adopt(self.files(uuid), base_name)

    def tidy(self, uuid: str) -> None:
        """Remove what a death left of a change of a disk's layers; no change may be under way.

        The disk may be open. Raises `OSError` and what reading its layout raises.
        """
        self.files(uuid).tidy()

    def rollback_overlay(self, uuid: str, base_name: str, size_bytes: int) -> None:
        """Let a closed disk, overlay or raw, begin anew over a manifest, of the manifest's size.

        Raises what `transitions.rollback` raises, and `NoSpace`.
        """
        with self._existing(uuid) as files:
            transitions.rollback(files, size_bytes, base_name)

    def finish_promotion(self, uuid: str) -> None:
        """Make a closed overlay raw, all of which has been filled; done twice is no error.

        Raises what `transitions.finish_promotion` raises, and `NoSpace`.
        """
        with self._existing(uuid) as files:
            transitions.finish_promotion(files)

    def freeze_raw(self, uuid: str) -> None:
        """Make a raw disk that nobody writes an overlay over its own file, which is frozen.

        Raises what `transitions.freeze_raw` raises, and `NoSpace`.
        """
        with self._existing(uuid) as files:
            transitions.freeze_raw(files)

    @contextmanager
    def _existing(self, uuid: str) -> Iterator[DiskFiles]:
        try:
            with full_disk_is_no_space(self._state_dir):
                yield self.files(uuid)
        except FileNotFoundError as error:
            raise NotFound(
                "disk-unknown", f"The files of disk {uuid} are missing ({error.filename})."
            ) from error

    def grow_raw(self, uuid: str, size_bytes: int) -> None:
        """Make a raw disk larger, durably; the size it has is no change.

        Raises `InvalidInput` (`disk-shrinks`), `NotFound` (`disk-unknown`), `NoSpace`.
        """
        with self._existing(uuid) as files:
            data = files.storage.open_file(files.data(RAW), exclusive=False)
            try:
                if data.size() > size_bytes:
                    raise InvalidInput(
                        "disk-shrinks",
                        f"The disk has {data.size()} bytes; it can only be made larger.",
                        field="size_bytes",
                    )
                before_bytes = data.size()
                try:
                    data.extend(size_bytes, reserve=False)
                except OSError:
                    # nobody has been told of the new end, so nothing is behind the old one
                    with suppress(OSError):
                        data.cut(before_bytes)
                    raise
            finally:
                data.close()

    def snapshot_raw(self, uuid: str, snapshot_id: str) -> None:
        """Keep what a raw disk has now, by sharing its extents, durably; done twice is no error.

        The disk may be in use: the copy is as after a power cut at one moment. Raises `OSError`
        (see `reflink.is_unsupported`), `NotFound` (`disk-unknown`), `NoSpace`.
        """
        with self._existing(uuid) as files:
            raw_snapshots.make(files.directory, snapshot_id)

    def rollback_raw(self, uuid: str, snapshot_id: str) -> None:
        """Let a raw disk have what a snapshot has, and its size; who has it open keeps the old file.

        Raises `NotFound` (`snapshot-unknown`), `NoSpace`, `OSError`.
        """
        with self._existing(uuid) as files:
            raw_snapshots.rollback(files.directory, snapshot_id)

    def delete_raw_snapshot(self, uuid: str, snapshot_id: str) -> None:
        """Remove a snapshot of a raw disk; none is no error."""
        raw_snapshots.delete(self.overlay_directory(uuid), snapshot_id)

    def raw_snapshot_path(self, uuid: str, snapshot_id: str) -> Path:
        """Return the file that is a snapshot of a raw disk, to be read only."""
        return raw_snapshots.path(self.overlay_directory(uuid), snapshot_id)

    def allocated_bytes(self, uuid: str) -> int:
        """Return the space that a disk's files take; extents shared with others are counted too.

        Snapshots are not counted.
        """
        with os.scandir(self.overlay_directory(uuid)) as entries:
            return sum(
                entry.stat(follow_symlinks=False).st_blocks * 512
                for entry in entries
                if entry.is_file(follow_symlinks=False)
            )

    def reflink_supported(self) -> bool:
        """Tell whether disks can share extents with chunk files; tried once, on real files."""
        with self._probing:
            if self._reflinks is None:
                chunks = self._state_dir / "chunks"
                source = chunks if chunks.is_dir() else self._stage
                self._reflinks = reflink.supported(source, self._stage)
            return self._reflinks


def _is_unsupported(error: Exception) -> bool:
    return isinstance(error, OSError) and reflink.is_unsupported(error)


def _remove(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)
