"""Checks of one disk's files against its row: the layout, the layers it names, snapshots, names.

What a layer holds is checked by `layer_check`, what a base holds by `base_check`. Never writes.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stratocache.fs.base_check import Bases
from stratocache.fs.disk_repair import Finding, removal
from stratocache.fs.layer_check import LayerFiles, check_layer
from stratocache.fs.layers import LAYOUT, RAW, RAW_DATA, SNAPSHOTS, DiskFiles, Layout

OLD_BITMAP = "bitmap"
"""Of an overlay of the first release, whose layer has no number and whose disk no layout."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class DiskCheck:
    """One disk to be checked: its row, those of its snapshots, its files.

    A daemon that died between a change of files and that of their row makes the second at its
    start. Unless the rows are `settled`, differences that such a death leaves are no findings.
    """

    row: Row
    snapshots: Sequence[Row]
    files: DiskFiles
    live_dir: Path
    bases: Bases
    """Told what the disk and its snapshots need."""
    settled: bool
    """Whether nothing is under way on the disk, and a daemon has looked at it."""

    @property
    def _uuid(self) -> str:
        uuid: str = self.row["uuid"]
        return uuid

    def findings(self, *, in_use: bool) -> Iterator[Finding]:
        """Yield what is wrong; of an overlay that is open only what holds still.

        Raises what `DiskFiles.layout` raises.
        """
        if not self.files.directory.is_dir():
            yield self._fault("disk-missing", f"{self.files.directory} is missing; restore it.")
            return
        layout = self.files.layout()
        old = layout is None and (self.files.directory / OLD_BITMAP).exists()
        form = "overlay" if old or layout is not None else "raw"
        if form != self.row["form"] and self.settled:
            yield self._fault(
                "form-differs",
                f"Disk {self._uuid} is {self.row['form']} in the state database and {form} in its "
                "files.",
            )
        if layout is not None:
            yield from self._check_layout(layout, in_use=in_use)
        elif old:
            yield from self._check_old(in_use=in_use)
        else:
            yield from self._check_raw()
            yield from self._check_no_layers()
        yield from self._check_snapshots()
        yield from self._check_names(layout, old=old)

    def _fault(self, code: str, message: str) -> Finding:
        return Finding(code, self._uuid, message)

    def _check_size(self, path: Path, size_bytes: int) -> Iterator[Finding]:
        wanted_bytes = self.row["size_bytes"]
        # files grow before their row does
        if size_bytes < wanted_bytes or (size_bytes > wanted_bytes and self.settled):
            yield self._fault(
                "size-differs", f"{path} says {size_bytes} bytes, the state database {wanted_bytes}."
            )  # fmt: skip

    def _check_raw(self) -> Iterator[Finding]:
        path = self.files.data(RAW)
        if path.is_file():
            yield from self._check_size(path, path.stat().st_size)
        else:
            yield self._fault("data-missing", f"{path} is missing; restore the disk.")

    def _check_no_layers(self) -> Iterator[Finding]:
        """Find layers of a disk without a layout: one that crashes leave has no block yet."""
        for path in sorted(self.files.directory.glob("*.data")):
            if path.stat().st_blocks:
                yield self._fault(
                    "layout-missing",
                    f"{path} is a layer, but {path.with_name(LAYOUT)} is missing; restore the disk.",
                )

    def _check_old(self, *, in_use: bool) -> Iterator[Finding]:
        files = self.files
        layer = LayerFiles(
            self._uuid, files.data(RAW), files.directory / OLD_BITMAP, files.first_live,
            self.row["size_bytes"],
        )  # fmt: skip
        yield from check_layer(layer, in_use=in_use)
        base = self.row.get("base_manifest") or self.row["base_image"]
        if base is not None:
            self.bases.need(base, f"disk {self._uuid}")

    def _check_layout(self, layout: Layout, *, in_use: bool) -> Iterator[Finding]:
        files = self.files
        yield from self._check_size(files.directory / LAYOUT, layout.size_bytes)
        layers = [(layout.top, layout.size_bytes)]
        if layout.frozen == RAW:
            yield from self._check_frozen_raw(layout.frozen_size_bytes or 0)
        elif layout.frozen is not None:
            layers.append((layout.frozen, layout.frozen_size_bytes or 0))
        for name, size_bytes in layers:
            layer = LayerFiles(
                self._uuid, files.data(name), files.bitmap(name), files.live(name), size_bytes
            )
            yield from check_layer(layer, in_use=in_use)
        if layout.base is not None:
            self.bases.need(layout.base, f"disk {self._uuid}")
        known = self.row.get("base_manifest")
        if self.settled and "base_manifest" in self.row and known != layout.base:
            yield self._fault(
                "base-differs",
                f"Disk {self._uuid} is built on {layout.base}, the state database says {known}: "
                "the former could be removed under it.",
            )

    def _check_frozen_raw(self, size_bytes: int) -> Iterator[Finding]:
        path = self.files.data(RAW)
        if not path.is_file():
            yield self._fault("data-missing", f"{path} is missing; restore the disk.")
        elif path.stat().st_size < size_bytes:
            yield self._fault("data-cut-off", f"{path} has less than {size_bytes} bytes.")

    def _check_snapshots(self) -> Iterator[Finding]:
        """Check the disk's snapshots against their rows, those that are files both ways."""
        directory = self.files.directory / SNAPSHOTS
        found = set(os.listdir(directory)) if directory.is_dir() else set()
        for row in self.snapshots:
            path = directory / row["id"]
            if row["state"] != "available":
                continue
            if row["form"] != "file":
                self.bases.need(row["id"], f"snapshot {row['id']} of disk {self._uuid}")
            elif row["id"] not in found:
                yield self._fault("snapshot-missing", f"{path} is missing; restore it.")
            elif path.stat().st_size != row["size_bytes"]:
                yield self._fault(
                    "snapshot-size-differs",
                    f"{path} has {path.stat().st_size} bytes, the snapshot {row['size_bytes']}.",
                )
        for name in sorted(found - {row["id"] for row in self.snapshots}):
            yield self._fault(
                "snapshot-unknown",
                f"{directory / name} is no snapshot that the state database knows.",
            )

    def _check_names(self, layout: Layout | None, *, old: bool) -> Iterator[Finding]:
        """Find files that a crash left: what the layout does not name has no meaning."""
        files = self.files
        named, live = {SNAPSHOTS}, set()
        if layout is None:
            named.add(RAW_DATA)
            if old:
                named.add(OLD_BITMAP)
                live.add(files.first_live.name)
        else:
            named.add(LAYOUT)
            for layer in (layout.top, layout.frozen):
                if layer is not None:
                    named |= {files.data(layer).name, files.bitmap(layer).name}
                    live.add(files.live(layer).name)
        lost = [files.directory / name for name in set(os.listdir(files.directory)) - named]
        for path in sorted(lost):
            yield self._leak("file-unreferenced", path)
        for path in sorted(self.live_dir.glob(f"{self._uuid}.*")):
            if path.name not in live:
                yield self._leak("live-bitmap-stale", path)

    def _leak(self, code: str, path: Path) -> Finding:
        return Finding(code, self._uuid, f"{path} is no part of the disk.", removal(path))
