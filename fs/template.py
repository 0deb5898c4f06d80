"""Images as single files that share the extents of their chunk files, to be cloned in one call.

Sharing a 2 GiB image chunk by chunk takes 4,096 calls for every clone; from a file that has all of
them, one. Such a template has no name: the kernel frees it with its last descriptor, so a crash
leaves nothing. It lives no longer than the process that verified its chunks.
"""

import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Protocol

from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.fs import reflink

_TEMPLATES_MAX = 16


class ChunkedImage(Protocol):
    """What a clone needs of an image: its length, and its chunks as files."""

    @property
    def size_bytes(self) -> int:
        """The image's length."""

    def open_chunk(self, index: int) -> int | None:
        """Return the descriptor of a chunk whose digest has been checked, None for zeros."""


class _Template:
    """The unnamed file of one image, closed when the last who uses it lets go."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.descriptor = -1

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class Templates:
    """The templates of images that were cloned lately; any thread may use them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._templates: OrderedDict[ChunkedImage, _Template] = OrderedDict()

    def clone(self, image: ChunkedImage, target: int) -> None:
        """Make `target`, an empty file, share all of an image.

        The first clone of an image opens, and so verifies, every chunk. Raises `OSError`, and
        `NotVerified` as `open_chunk` does.
        """
        with self._lock:
            template = self._templates.setdefault(image, _Template())
            self._templates.move_to_end(image)
            if len(self._templates) > _TEMPLATES_MAX:
                self._templates.popitem(last=False)
        with template.lock:
            if template.descriptor < 0:
                template.descriptor = self._assemble(image)
        reflink.clone_file(template.descriptor, target)

    def forget(self, image: ChunkedImage) -> None:
        """Let go of an image's template, whose extents would outlive the image."""
        with self._lock:
            self._templates.pop(image, None)

    def forget_all(self) -> None:
        """Let go of every template: a chunk that one of them shares has rotted."""
        with self._lock:
            self._templates.clear()

    def _assemble(self, image: ChunkedImage) -> int:
        target = os.open(self._directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(target, image.size_bytes)
            block_bytes = os.fstatvfs(target).f_bsize
            for index, offset in enumerate(range(0, image.size_bytes, CHUNK_BYTES)):
                chunk = image.open_chunk(index)
                if chunk is None:
                    continue
                size = min(CHUNK_BYTES, image.size_bytes - offset)
                whole = size - size % block_bytes
                if whole:
                    reflink.clone_range(chunk, 0, whole, target, offset)
                if whole < size:
                    os.pwrite(target, os.pread(chunk, size - whole, whole), offset + whole)
        except BaseException:
            os.close(target)
            raise
        return target
