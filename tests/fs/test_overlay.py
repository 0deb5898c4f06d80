"""The overlay engine on real files, and on a storage that fails where it is told to."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import trio
import trio.testing
from support.crash_storage import CrashStorage, ProcessDied
from support.overlays import OverlayBench

from stratocache.cache.errors import Conflict, Internal, NotVerified
from stratocache.fs import bitmap
from stratocache.fs.bitmap import BLOCK_BYTES
from stratocache.fs.storage import FILES

MIB = 1024**2
SIZE_BYTES = 64 * BLOCK_BYTES + 1234
BASE = Random(7).randbytes(40 * BLOCK_BYTES + 77)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[OverlayBench]:
    """An overlay on real files; neither size is a multiple of anything."""
    made = OverlayBench(tmp_path, SIZE_BYTES, BASE, FILES)
    yield made
    made.overlay.close()


@pytest.fixture
def crash_bench() -> OverlayBench:
    """The same on a storage that can fail and forget."""
    return OverlayBench(Path("/crash"), SIZE_BYTES, BASE, CrashStorage())


def test_untouched_disk_reads_the_base_then_zeros(bench: OverlayBench) -> None:
    """A disk nobody wrote reads its base, and zeros behind the base's end."""
    assert bench.read_all() == bench.pristine


def test_read_ends_at_the_end_of_the_disk(bench: OverlayBench) -> None:
    """A read across the end is short, one behind it is empty."""
    assert len(bench.overlay.read_nowait(SIZE_BYTES - 10, 100) or b"") == 10
    assert bench.overlay.read_nowait(SIZE_BYTES + 5, 100) == b""


def test_write_past_the_end_is_refused(bench: OverlayBench) -> None:
    """A write across the end is ENOSPC and changes nothing."""
    with pytest.raises(OSError, match="past the end") as caught:
        bench.overlay.write_nowait(SIZE_BYTES - 3, b"1234")
    assert caught.value.errno == errno.ENOSPC
    assert bench.read_all() == bench.pristine


def test_death_of_the_process_loses_nothing_acknowledged(bench: OverlayBench) -> None:
    """Without any flush, real files and the live bitmap hold every acknowledged write."""
    model = bench.pristine
    random = Random(3)
    for _ in range(200):
        offset = random.randrange(SIZE_BYTES)
        written = random.randbytes(min(random.choice([1, 700, 4096, 9000]), SIZE_BYTES - offset))
        assert bench.overlay.write_nowait(offset, written)
        model[offset : offset + len(written)] = written
        if random.random() < 0.05:
            bench.reopen()
    bench.reopen()
    assert bench.read_all() == model


def test_flushed_blocks_survive_the_loss_of_the_live_bitmap(bench: OverlayBench) -> None:
    """A flush of a process that followed another makes durable what both have written."""
    bench.overlay.write_nowait(5000, b"first")
    bench.reopen()
    bench.overlay.write_nowait(100_000, b"second")
    trio.run(bench.overlay.flush)
    bench.overlay.close()
    bench.live.unlink()
    bench.overlay = bench.open()
    model = bench.pristine
    model[5000:5005] = b"first"
    model[100_000:100_006] = b"second"
    assert bench.read_all() == model


@pytest.mark.parametrize("offset", [24, 40], ids=["generation", "boot"])
def test_stale_live_bitmap_is_not_used(bench: OverlayBench, offset: int) -> None:
    """A live bitmap of another disk or another boot is replaced by the durable one."""
    bench.overlay.write_nowait(0, bytes(BLOCK_BYTES))
    bench.overlay.close()
    header = bytearray(bench.live.read_bytes())
    header[offset] ^= 0xFF
    bench.live.write_bytes(header)
    bench.overlay = bench.open()
    assert bench.read_all() == bench.pristine


def test_live_bitmap_that_lacks_a_durable_bit_is_not_used(bench: OverlayBench) -> None:
    """A live bitmap older than the durable one cannot hide what was flushed."""
    old = bench.live.read_bytes()
    bench.overlay.write_nowait(0, b"flushed")
    trio.run(bench.overlay.aclose)
    bench.live.write_bytes(old)
    bench.overlay = bench.open()
    assert bench.overlay.read_nowait(0, 7) == b"flushed"


def test_partial_write_waits_for_the_base_only_at_its_edges(bench: OverlayBench) -> None:
    """A write fetches from the base no more than the blocks it covers in part."""
    bench.base.asked.clear()
    assert bench.overlay.write_nowait(100, bytes(3 * BLOCK_BYTES))
    assert bench.base.asked == [(0, BLOCK_BYTES), (3 * BLOCK_BYTES, BLOCK_BYTES)]
    bench.base.asked.clear()
    assert bench.overlay.write_nowait(200, bytes(3 * BLOCK_BYTES))
    assert bench.base.asked == []


def test_write_nowait_does_nothing_when_it_would_wait(bench: OverlayBench) -> None:
    """A write that needs a cold base returns False and leaves no trace."""
    bench.base.cold = True
    assert not bench.overlay.write_nowait(10, b"x")
    bench.base.cold = False
    assert bench.read_all() == bench.pristine
    assert not (bench.directory / "1.data").read_bytes().strip(b"\0")


def test_writes_to_one_block_while_the_base_is_fetched(bench: OverlayBench) -> None:
    """Partial writes that wait for the same block, and one that does not wait, all survive."""

    async def scenario() -> None:
        bench.base.cold = True
        bench.base.gate = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bench.overlay.write, 10, b"first")
            nursery.start_soon(bench.overlay.write, 20, b"second")
            await trio.testing.wait_all_tasks_blocked()
            bench.base.cold = False
            assert bench.overlay.write_nowait(30, b"third")
            assert bench.overlay.write_nowait(40, b"fourth")
            bench.base.gate.set()

    trio.run(scenario)
    model = bench.pristine
    model[10:15], model[20:26], model[30:35], model[40:46] = (
        b"first",
        b"second",
        b"third",
        b"fourth",
    )
    assert bench.read_all() == model


def test_whole_block_written_while_the_base_is_fetched(bench: OverlayBench) -> None:
    """A block written whole during another's wait keeps its bytes around the waiter's."""

    async def scenario() -> None:
        bench.base.cold = True
        bench.base.gate = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bench.overlay.write, 10, b"waiter")
            await trio.testing.wait_all_tasks_blocked()
            assert bench.overlay.write_nowait(0, b"w" * BLOCK_BYTES)
            bench.base.gate.set()

    trio.run(scenario)
    assert bench.overlay.read_nowait(0, BLOCK_BYTES) == (b"w" * BLOCK_BYTES)[:10] + b"waiter" + (
        b"w" * (BLOCK_BYTES - 16)
    )


def test_data_is_synced_before_the_bitmap_is_written(crash_bench: OverlayBench) -> None:
    """A flush calls fdatasync(data), writes the bitmap, then fdatasync(bitmap), in that order."""
    assert isinstance(crash_bench.storage, CrashStorage)
    crash_bench.overlay.write_nowait(0, bytes(BLOCK_BYTES))
    crash_bench.storage.calls.clear()
    trio.run(crash_bench.overlay.flush)
    assert crash_bench.storage.calls == [
        ("1.data", "fdatasync"), ("1.bitmap", "pwrite"), ("1.bitmap", "fdatasync"),
    ]  # fmt: skip


def test_flush_with_nothing_new_touches_no_file(crash_bench: OverlayBench) -> None:
    """A second flush without a write in between syncs nothing."""
    assert isinstance(crash_bench.storage, CrashStorage)
    crash_bench.overlay.write_nowait(0, b"x")
    trio.run(crash_bench.overlay.flush)
    crash_bench.storage.calls.clear()
    trio.run(crash_bench.overlay.flush)
    assert crash_bench.storage.calls == []


def test_failed_data_sync_is_never_forgotten(crash_bench: OverlayBench) -> None:
    """After one failed fdatasync of the data every flush fails, in the next process too."""
    assert isinstance(crash_bench.storage, CrashStorage)
    crash_bench.overlay.write_nowait(0, b"lost")
    crash_bench.storage.faults["1.data", "fdatasync"] = errno.EIO
    for message in ("Input/output", "earlier flush"):
        with pytest.raises(OSError, match=message):
            trio.run(crash_bench.overlay.flush)
    crash_bench.reopen()
    with pytest.raises(OSError, match="earlier flush") as caught:
        trio.run(crash_bench.overlay.flush)
    assert caught.value.errno == errno.EIO


def test_failed_bitmap_sync_is_repeated(crash_bench: OverlayBench) -> None:
    """A flush whose bitmap could not be written fails, and the next one writes it again."""
    assert isinstance(crash_bench.storage, CrashStorage)
    crash_bench.overlay.write_nowait(0, b"kept")
    crash_bench.storage.faults["1.bitmap", "fdatasync"] = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        trio.run(crash_bench.overlay.flush)
    trio.run(crash_bench.overlay.flush)
    crash_bench.overlay.close()
    crash_bench.storage.host_dies(Random(0))
    crash_bench.overlay = crash_bench.open()
    assert crash_bench.overlay.read_nowait(0, 4) == b"kept"


@pytest.mark.parametrize("fault", [errno.EIO, CrashStorage.DIE], ids=["failed", "died"])
@pytest.mark.parametrize("call", ["pwrite", "fdatasync"])
def test_half_written_bitmap_is_written_again_by_the_next_process(
    crash_bench: OverlayBench, call: str, fault: int
) -> None:
    """A process that ended with the bitmap in the page cache only leaves the rest to the next."""
    assert isinstance(crash_bench.storage, CrashStorage)
    crash_bench.overlay.write_nowait(0, b"kept")
    crash_bench.storage.faults["1.bitmap", call] = fault
    with pytest.raises((OSError, ProcessDied)):
        trio.run(crash_bench.overlay.flush)
    crash_bench.reopen()
    trio.run(crash_bench.overlay.flush)
    crash_bench.overlay.close()
    crash_bench.storage.host_dies(Random(0))
    crash_bench.overlay = crash_bench.open()
    assert crash_bench.overlay.read_nowait(0, 4) == b"kept"


def test_writes_during_flushes_are_durable_after_the_next(bench: OverlayBench) -> None:
    """Flushes that overlap writes and one another leave a durable bitmap that lacks no bit."""

    async def write_and_flush(first: int) -> None:
        for block in range(first, 64, 4):
            await bench.overlay.write(block * BLOCK_BYTES, bytes([block + 1]) * BLOCK_BYTES)
            await bench.overlay.flush()

    async def scenario() -> None:
        async with trio.open_nursery() as nursery:
            for first in range(4):
                nursery.start_soon(write_and_flush, first)

    trio.run(scenario)
    bench.overlay.close()
    bench.live.unlink()
    bench.overlay = bench.open()
    found = bench.read_all()
    assert all(found[block * BLOCK_BYTES] == block + 1 for block in range(64))


def test_disk_is_opened_once(bench: OverlayBench) -> None:
    """A disk that is open cannot be opened again until it is closed."""
    with pytest.raises(Conflict) as caught:
        bench.open()
    assert caught.value.code == "disk-in-use"


def test_later_format_is_refused(bench: OverlayBench) -> None:
    """A bitmap of a later version is refused by name, not misread."""
    bench.overlay.close()
    path = bench.directory / "1.bitmap"
    content = bytearray(path.read_bytes())
    content[8] = bitmap.VERSION + 1
    path.write_bytes(content)
    with pytest.raises(Internal) as caught:
        bench.open()
    assert caught.value.code == "overlay-too-new"
    content[8] = bitmap.VERSION
    path.write_bytes(content)
    bench.overlay = bench.open()


@pytest.mark.parametrize("position", range(0, 60, 4))
def test_damaged_header_is_refused(bench: OverlayBench, position: int) -> None:
    """Any changed field of the header is found, and the file is left as it is."""
    bench.overlay.close()
    path = bench.directory / "1.bitmap"
    good = path.read_bytes()
    bad = bytearray(good)
    bad[position] ^= 0x80
    path.write_bytes(bad)
    with pytest.raises((NotVerified, Internal)):
        bench.open()
    assert path.read_bytes() == bytes(bad)
    path.write_bytes(good)
    bench.overlay = bench.open()


@pytest.mark.parametrize("name", ["1.data", "1.bitmap"])
def test_truncated_file_is_refused(bench: OverlayBench, name: str) -> None:
    """A file that is too short is damage, whatever it still holds."""
    bench.overlay.close()
    path = bench.directory / name
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(NotVerified) as caught:
        bench.open()
    assert caught.value.code == "overlay-damaged"
    os.truncate(path, size)
    bench.overlay = bench.open()


def test_large_disk_costs_little(tmp_path: Path) -> None:
    """A disk of 1 TiB takes its bitmap's 32 MiB, and a write at its very end works."""
    size = 1024**4 + 17
    bench = OverlayBench(tmp_path, size, BASE, FILES)
    assert bench.overlay.write_nowait(size - 5, b"end")
    assert bench.overlay.read_nowait(size - 9, 100) == b"\0\0\0\0end\0\0"
    allocated = sum(path.stat().st_blocks * 512 for path in bench.directory.iterdir())
    assert allocated < 33 * MIB
    bench.overlay.close()
