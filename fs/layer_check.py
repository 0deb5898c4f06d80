"""Checks of one layer of an overlay disk: its bitmaps against one another and against its data.

Reads the files by itself, from their description in OVERLAY.md, rather than with the engine: a
checker that shares the engine's code shares its mistakes. Never writes.
"""

import os
import struct
import uuid
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from stratocache.fs.bitmap import BLOCK_BYTES, HEADER_BYTES, PAGE_BYTES, VERSION, file_bytes
from stratocache.fs.disk_repair import Finding, punching, removal
from stratocache.fs.sparse_file import extents

_MAGIC = b"stratobm"
_FIELDS = struct.Struct("<8sIIQ16s16s")
_CHECKSUM = struct.Struct("<I")
_DATA_FAILED_OFFSET = 64
_NO_BOOT = bytes(16)
_PIECE_BYTES = 256 * PAGE_BYTES
_PIECE_BLOCKS = 8 * PAGE_BYTES
_RANGES_MAX = 100_000
"""Ranges that one finding keeps to be punched; what is beyond is found by the next check."""


@dataclass(frozen=True, slots=True)
class LayerFiles:
    """One layer's files, and how long the disk was that it is a layer of."""

    disk: str
    data: Path
    bitmap: Path
    live: Path
    size_bytes: int


@dataclass(frozen=True, slots=True)
class _Header:
    size_bytes: int
    generation: bytes
    boot: bytes
    data_failed: bool


def boot_id() -> bytes:
    """Return what names this boot of the host (random(4), boot_id)."""
    return uuid.UUID(Path("/proc/sys/kernel/random/boot_id").read_text().strip()).bytes


def check_layer(layer: LayerFiles, *, in_use: bool) -> Iterator[Finding]:
    """Yield what is wrong with a layer; of one in use only what does not change meanwhile."""
    header, fault = _read_header(layer.bitmap)
    if header is None:
        yield Finding("bitmap-damaged", layer.disk, f"{layer.bitmap} {fault}; restore the disk.")
        return
    if header.boot != _NO_BOOT or header.size_bytes < layer.size_bytes:
        yield Finding(
            "bitmap-damaged",
            layer.disk,
            f"{layer.bitmap} does not describe a disk of {layer.size_bytes} bytes; restore the "
            "disk.",
        )
        return
    if not layer.data.is_file():
        yield Finding("data-missing", layer.disk, f"{layer.data} is missing; restore the disk.")
        return
    data_bytes = layer.data.stat().st_size
    if data_bytes < header.size_bytes:
        yield Finding(
            "data-cut-off",
            layer.disk,
            f"{layer.data} has {data_bytes} bytes of {header.size_bytes}; restore the disk.",
        )
        return
    live_usable, findings = _check_live(layer, header)
    yield from findings
    if not in_use:
        yield from _check_blocks(layer, header, live_usable=live_usable)


def _read_header(path: Path) -> tuple[_Header | None, str]:
    """Return the header of a bitmap of any length that holds it, or None and what is wrong."""
    try:
        with path.open("rb") as file:
            content = file.read(HEADER_BYTES)
            length = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return None, "is missing"
    if len(content) < HEADER_BYTES:
        return None, "is cut off in its header"
    magic, version, block_bytes, size_bytes, generation, boot = _FIELDS.unpack_from(content)
    if magic != _MAGIC:
        return None, "is not a bitmap"
    if version > VERSION:
        return None, f"has format {version}, of a newer Stratocache"
    (checksum,) = _CHECKSUM.unpack_from(content, _FIELDS.size)
    if checksum != zlib.crc32(content[: _FIELDS.size]) or block_bytes != BLOCK_BYTES:
        return None, "has a damaged header"
    if length < file_bytes(size_bytes):
        return None, f"has {length} bytes of {file_bytes(size_bytes)}"
    return _Header(size_bytes, generation, boot, content[_DATA_FAILED_OFFSET] != 0), ""


def _check_live(layer: LayerFiles, durable: _Header) -> tuple[bool, list[Finding]]:
    """Tell whether the live bitmap counts, and what is wrong with it."""
    if not layer.live.exists():
        return False, []
    header, fault = _read_header(layer.live)
    if header is None:
        return False, [
            Finding(
                "live-bitmap-damaged",
                layer.disk,
                f"{layer.live} {fault}; blocks first written since the last flush will be the "
                "base's again.",
            )
        ]
    if (header.boot, header.generation) != (boot_id(), durable.generation):
        return False, [
            Finding(
                "live-bitmap-stale",
                layer.disk,
                f"{layer.live} is of another boot or disk and is not used.",
                removal(layer.live),
            )
        ]
    if header.data_failed:
        return True, [
            Finding(
                "flush-failed",
                layer.disk,
                f"A sync of {layer.data} failed since this host booted, so writes may be lost; "
                "check the medium and restore the disk, or accept what is there by a reboot.",
            )
        ]
    return True, []


def _check_blocks(layer: LayerFiles, header: _Header, *, live_usable: bool) -> Iterator[Finding]:
    with ExitStack() as opened:
        durable = opened.enter_context(layer.bitmap.open("rb", buffering=0)).fileno()
        live = None
        if live_usable:
            live = opened.enter_context(layer.live.open("rb", buffering=0)).fileno()
        blocks = -(-header.size_bytes // BLOCK_BYTES)
        beyond, behind = _compare(durable, live, blocks, file_bytes(header.size_bytes))
        if beyond:
            yield Finding(
                "bitmap-beyond-end",
                layer.disk,
                f"{layer.bitmap} has {beyond} blocks behind the disk's end; restore the disk.",
            )
        if behind:
            yield Finding(
                "live-bitmap-behind",
                layer.disk,
                f"{layer.live} lacks {behind} blocks that {layer.bitmap.name} has, and is not used.",
            )
        data = opened.enter_context(layer.data.open("rb", buffering=0)).fileno()
        ranges = _unreferenced(data, durable, None if behind else live)
    if ranges:
        size_bytes = sum(end - start for start, end in ranges)
        yield Finding(
            "space-unreferenced",
            layer.disk,
            f"{layer.data} has {size_bytes} bytes in blocks that are not the disk's.",
            punching(layer.data, ranges),
        )


def _compare(durable: int, live: int | None, blocks: int, length: int) -> tuple[int, int]:
    """Return how many bits are set behind the last block, and how many the live bitmap lacks."""
    beyond = behind = 0
    for offset in range(HEADER_BYTES, length, _PIECE_BYTES):
        size = min(_PIECE_BYTES, length - offset)
        old = int.from_bytes(os.pread(durable, size, offset), "little")
        first = (offset - HEADER_BYTES) * 8
        beyond += (old >> max(0, blocks - first)).bit_count()
        if live is not None:
            new = int.from_bytes(os.pread(live, size, offset), "little")
            behind += (old & ~new).bit_count()
            beyond += ((new & ~old) >> max(0, blocks - first)).bit_count()
    return beyond, behind


def _unreferenced(data: int, durable: int, live: int | None) -> list[tuple[int, int]]:
    """Return the allocated ranges of the data file in whose blocks neither bitmap has a bit."""
    unit = max(BLOCK_BYTES, os.fstatvfs(data).f_frsize)
    end = os.fstat(data).st_size
    found: list[tuple[int, int]] = []
    for start, stop, allocated in extents(data, 0, end):
        if not allocated:
            continue
        for run_start, run_end in _clear_runs(start, stop, durable, live):
            # the file system frees whole units of its own
            first = -(-run_start // unit) * unit
            last = run_end if run_end == end else run_end // unit * unit
            if first >= last:
                continue
            if found and found[-1][1] == first:
                found[-1] = (found[-1][0], last)
            elif len(found) < _RANGES_MAX:
                found.append((first, last))
    return found


def _clear_runs(
    start: int, stop: int, durable: int, live: int | None
) -> Iterator[tuple[int, int]]:  # fmt: skip
    """Yield the ranges of [start, stop) whose blocks have no bit; a block cut by `start` has one."""
    first, end = -(-start // BLOCK_BYTES), -(-stop // BLOCK_BYTES)
    while first < end:
        piece = first - first % _PIECE_BLOCKS
        count = min(end, piece + _PIECE_BLOCKS) - first
        bits = _bits(durable, piece)
        if live is not None:
            bits |= _bits(live, piece)
        for run, length in _zeros(bits >> (first - piece), count):
            run_start = (first + run) * BLOCK_BYTES
            yield run_start, min(stop, run_start + length * BLOCK_BYTES)
        first += count


def _bits(descriptor: int, first_block: int) -> int:
    content = os.pread(descriptor, PAGE_BYTES, HEADER_BYTES + first_block // 8)
    return int.from_bytes(content, "little")


def _zeros(bits: int, count: int) -> Iterator[tuple[int, int]]:
    """Yield (start, length) of each run of zeros among the lowest `count` bits."""
    position = 0
    while position < count:
        rest = bits >> position
        ones = (rest ^ (rest + 1)).bit_length() - 1
        if ones:
            position += ones
            continue
        zeros = (rest & -rest).bit_length() - 1 if rest else count
        yield position, min(zeros, count - position)
        position += zeros
