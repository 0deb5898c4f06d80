"""What the files of an overlay disk mean: `layout.json`, and the names of its layers' files.

    STATE_DIR/disks/UUID/layout.json    which layers there are; a raw disk has none
    STATE_DIR/disks/UUID/N.data         the blocks that were written into layer N
    STATE_DIR/disks/UUID/N.bitmap       which blocks those are
    STATE_DIR/disks/UUID/data           a raw disk, or a raw disk's file as the frozen layer
    RUN_DIR/live/UUID.N.bitmap          the live bitmap of layer N

`layout.json` is replaced in one step and is the only place that decides: files which it does not
name are nothing, whatever they hold. Formats and the order of writes are in CRASH.md.
"""

import json
import logging
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from stratocache.cache.errors import Internal, NotVerified
from stratocache.fs.storage import FILES, Storage

log = logging.getLogger(__name__)

VERSION: Final = 1
LAYOUT: Final = "layout.json"
RAW: Final = "raw"
"""As a frozen layer: the file `data`, all of whose blocks count."""
RAW_DATA: Final = "data"
SNAPSHOTS: Final = "snapshots"
"""Directory of a raw disk's snapshots."""
FIRST_LAYER: Final = "1"

_FORMAT = "stratocache-disk"
_LAYOUT_BYTES_MAX = 4096
_LAYER = re.compile(r"[1-9][0-9]{0,17}")
_OURS = re.compile(r"data(\.new)?|bitmap|layout\.json(\.new)?|[1-9][0-9]{0,17}\.(data|bitmap)")
_BASE = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SIZE_BYTES_MAX = 2**62


@dataclass(frozen=True)
class Layout:
    """The layers of one overlay disk, from the top: `top`, `frozen`, `base`."""

    size_bytes: int
    """Length of the disk."""
    top: str
    """The layer that is written."""
    frozen: str | None
    """The layer below it, which never changes again: a layer's number, or `RAW`."""
    frozen_size_bytes: int | None
    """Length of the disk when that was frozen; zeros are behind it."""
    base: str | None
    """Name of the manifest below all; None reads zeros."""

    @property
    def next_layer(self) -> str:
        """The name of the layer that comes above the top."""
        return str(int(self.top) + 1)

    def to_json(self) -> bytes:
        """Return the content of `layout.json`."""
        fields = {"format": _FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps({**fields, "crc32": _checksum(fields)}, indent=1).encode() + b"\n"

    @classmethod
    def from_json(cls, content: bytes, path: Path) -> "Layout":
        """Read what `to_json` wrote.

        Raises `Internal` (`overlay-too-new`) for a later version, `NotVerified`
        (`overlay-damaged`) for anything else that this version did not write.
        """
        try:
            fields = json.loads(content) if len(content) <= _LAYOUT_BYTES_MAX else None
        except (ValueError, RecursionError):
            fields = None
        if not isinstance(fields, dict) or fields.get("format") != _FORMAT:
            raise _damaged(path, "it is not the layout of a disk")
        version = fields.get("version")
        if isinstance(version, int) and version > VERSION:
            raise Internal(
                "overlay-too-new",
                f"{path} has format {version}, this Stratocache knows {VERSION}; "
                "install a newer one.",
            )
        checksum = fields.pop("crc32", None)
        if version != VERSION or checksum != _checksum(fields):
            raise _damaged(path, "its checksum is wrong")
        del fields["format"], fields["version"]
        try:
            layout = cls(**fields)
        except TypeError:
            raise _damaged(path, "its fields are not those of this version") from None
        fault = layout._fault()
        if fault is not None:
            raise _damaged(path, fault)
        return layout

    def _fault(self) -> str | None:
        if not _is_size(self.size_bytes):
            return "size_bytes is not a size"
        if not _matches(_LAYER, self.top):
            return "top is not a layer"
        if self.base is not None and not _matches(_BASE, self.base):
            return "base is not the name of a manifest"
        if self.frozen is None:
            return None if self.frozen_size_bytes is None else "nothing is frozen but has a size"
        if self.frozen != RAW and not _matches(_LAYER, self.frozen):
            return "frozen is not a layer"
        if self.frozen == self.top:
            return "one layer is both top and frozen"
        if not _is_size(self.frozen_size_bytes) or (self.frozen_size_bytes or 0) > self.size_bytes:
            return "frozen_size_bytes is not a size up to the disk's"
        return None


class DiskFiles:
    """The files of one disk; every method may block."""

    def __init__(self, directory: Path, live_prefix: Path, storage: Storage = FILES) -> None:
        self.directory = directory
        self.storage = storage
        self._live_prefix = live_prefix

    def data(self, layer: str) -> Path:
        """Return the data file of a layer, or of `RAW`."""
        return self.directory / (RAW_DATA if layer == RAW else f"{layer}.data")

    def bitmap(self, layer: str) -> Path:
        """Return the durable bitmap of a layer."""
        return self.directory / f"{layer}.bitmap"

    def live(self, layer: str) -> Path:
        """Return the live bitmap of a layer."""
        return self._live_prefix.with_name(f"{self._live_prefix.name}.{layer}.bitmap")

    @property
    def first_live(self) -> Path:
        """The live bitmap of an overlay of the first release."""
        return self._live_prefix.with_name(f"{self._live_prefix.name}.bitmap")

    def layout(self) -> Layout | None:
        """Read the layout; None for a raw disk. Raises as `Layout.from_json`."""
        path = self.directory / LAYOUT
        content = self.storage.read_small(path, _LAYOUT_BYTES_MAX)
        return None if content is None else Layout.from_json(content, path)

    def write_layout(self, layout: Layout) -> None:
        """Replace the layout, durably. After `OSError` either layout may be there."""
        self.storage.replace_small(self.directory / LAYOUT, layout.to_json())

    def remove_layout(self) -> None:
        """Make the disk raw, durably. After `OSError` the layout may be there or not."""
        self.storage.remove(self.directory / LAYOUT)
        self.storage.sync_directory(self.directory)

    @contextmanager
    def restoring(self, layout: Layout | None) -> Iterator[None]:
        """Put a layout back when the block, which exchanges it, raises `OSError`.

        Who is told that a change failed finds the disk as it was; unless that fails too.
        """
        try:
            yield
        except OSError:
            self.restore(layout)
            raise

    def restore(self, layout: Layout | None) -> None:
        """Put a layout back, as far as that can be done."""
        with suppress(OSError):
            if layout is None:
                self.remove_layout()
            elif self.layout() != layout:
                self.write_layout(layout)

    @contextmanager
    def tidying(self) -> Iterator[None]:
        """Let the removal of what a change made meaningless fail: the next opening does it."""
        try:
            yield
        except OSError as error:
            log.warning("%s: what it does not need any more stays: %s", self.directory, error)

    def remove_layer(self, layer: str) -> None:
        """Remove the files of a layer that the layout does not name; not synced, not needed.

        The live bitmap goes first: `sweep` finds a layer by its files in the disk's directory.
        """
        if layer != RAW:
            self.storage.remove(self.live(layer))
            self.storage.remove(self.bitmap(layer))
        self.storage.remove(self.data(layer))

    def sweep(self, layout: Layout | None) -> None:
        """Remove what a crash left: every file that the layout, None for raw, does not name."""
        for name in self._leftovers(layout):
            layer = name.partition(".")[0]
            if layer.isdecimal():
                self.storage.remove(self.live(layer))
            self.storage.remove(self.directory / name)

    def tidy(self) -> None:
        """Sweep a disk that need not be open; nobody may change its layers meanwhile.

        Raises `OSError` and what `layout` raises.
        """
        layout = self.layout()
        if self._leftovers(layout):
            # the layout on the medium may be the one before, which names them
            self.storage.sync_directory(self.directory)
            self.sweep(layout)

    def _leftovers(self, layout: Layout | None) -> list[str]:
        named = {SNAPSHOTS}
        if layout is None:
            named.add(RAW_DATA)
        else:
            named |= {LAYOUT, self.data(layout.top).name, self.bitmap(layout.top).name}
            if layout.frozen is not None:
                named |= {self.data(layout.frozen).name, self.bitmap(layout.frozen).name}
        # by name: nothing else of ours was ever here, and nothing else is ours to remove
        unnamed = sorted(set(self.storage.names(self.directory)) - named)
        return [name for name in unnamed if _OURS.fullmatch(name)]


def _checksum(fields: dict[str, object]) -> int:
    return zlib.crc32(json.dumps(fields, sort_keys=True).encode())


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= _SIZE_BYTES_MAX


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _damaged(path: Path, fault: str) -> NotVerified:
    return NotVerified("overlay-damaged", f"{path}: {fault}; restore the disk.")
