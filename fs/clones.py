"""Raw disks that begin by sharing all extents of an image: many made at once, synced at once."""

import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from stratocache.cache.errors import InvalidInput, StratocacheError
from stratocache.cache.space import full_disk_is_no_space
from stratocache.fs.group_sync import sync_all
from stratocache.fs.template import ChunkedImage, Templates

STAGED = "disk-"
DIRECTORY_MODE = 0o700
_FILE_MODE = 0o600


@dataclass(frozen=True, slots=True)
class Clone:
    """A disk that is to begin as a copy of an image."""

    uuid: str
    size_bytes: int
    image: ChunkedImage


class Clones:
    """Makes the directories of clones; any thread may use it, one at a time on one disk."""

    def __init__(self, state_dir: Path, stage: Path, disks: Path) -> None:
        self._state_dir = state_dir
        self._stage = stage
        self._disks = disks
        self._templates = Templates(stage)

    def forget_images(self) -> None:
        """Let go of what is kept of all images: the next clones verify their chunks again."""
        self._templates.forget_all()

    def forget_image(self, image: ChunkedImage) -> None:
        """Let go of what is kept of an image for its next clone."""
        self._templates.forget(image)

    def make(self, clones: Sequence[Clone]) -> dict[str, StratocacheError | OSError]:
        """Make disks that are not there, durably but for their names in `disks/`.

        Returns what went wrong with each that was not made: `InvalidInput` (`disk-too-small`),
        `NoSpace`, `NotVerified` as `open_chunk` raises it, `OSError`.
        """
        failures: dict[str, StratocacheError | OSError] = {}
        staged: list[tuple[Clone, tuple[int, int]]] = []
        for clone in clones:
            try:
                staged.append((clone, self._make_staged(clone)))
            except (StratocacheError, OSError) as error:
                failures[clone.uuid] = error.with_traceback(None)  # which would hold this frame
        synced = sync_all([descriptor for _, pair in staged for descriptor in pair])
        for index, (clone, pair) in enumerate(staged):
            for descriptor in pair:
                os.close(descriptor)
            try:
                for failure in synced[2 * index : 2 * index + 2]:
                    if failure is not None:
                        raise failure
                staged_directory(self._stage, clone.uuid).rename(self._disks / clone.uuid)
            except OSError as error:
                failures[clone.uuid] = error.with_traceback(None)
        for uuid in failures:
            shutil.rmtree(staged_directory(self._stage, uuid), ignore_errors=True)
        return failures

    def _make_staged(self, clone: Clone) -> tuple[int, int]:
        """Make the files of a clone, not durably; return its data and its directory, open."""
        check_room(clone.size_bytes, clone.image.size_bytes)
        staged = staged_directory(self._stage, clone.uuid)
        with full_disk_is_no_space(self._state_dir), ExitStack() as opened:
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir(mode=DIRECTORY_MODE)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            data = os.open(staged / "data", flags, _FILE_MODE)
            opened.callback(os.close, data)
            self._templates.clone(clone.image, data)
            os.ftruncate(data, clone.size_bytes)
            directory = os.open(staged, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            opened.pop_all()
        return data, directory


def staged_directory(stage: Path, uuid: str) -> Path:
    """Return where a disk is made or removed."""
    return stage / f"{STAGED}{uuid}"


def check_room(size_bytes: int, wanted_bytes: int) -> None:
    """Raise `InvalidInput` (`disk-too-small`) for a disk that cannot hold its image."""
    if size_bytes < wanted_bytes:
        raise InvalidInput(
            "disk-too-small",
            f"The image has {wanted_bytes} bytes; make the disk at least that large.",
            field="size_bytes",
        )
