"""Changes of an overlay's layers on real files: freeze, rebase, growth, promotion, a full disk."""

import errno
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import Random

import pytest
import trio
import trio.testing
from support.crash_storage import CrashStorage, ProcessDied
from support.overlays import ChunkedImageFile, ImageFile, OverlayBench, small_chunks

from stratocache.cache.errors import Conflict, NotVerified
from stratocache.fs import transitions
from stratocache.fs.bitmap import BLOCK_BYTES
from stratocache.fs.layers import RAW, DiskFiles, Layout
from stratocache.fs.overlay import Overlay
from stratocache.fs.storage import FILES

SIZE_BYTES = 64 * BLOCK_BYTES + 1234
BASE = Random(7).randbytes(40 * BLOCK_BYTES + 77)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[OverlayBench]:
    """An overlay on real files."""
    with small_chunks():
        made = OverlayBench(tmp_path, SIZE_BYTES, BASE, FILES)
        yield made
        made.overlay.close()


@pytest.fixture
def crash_bench() -> OverlayBench:
    """The same on a storage that can fail."""
    return OverlayBench(Path("/crash"), SIZE_BYTES, BASE, CrashStorage())


def frozen_content(overlay: Overlay, base: bytes) -> bytes:
    """Return what a snapshot of the frozen layer has."""
    frozen = overlay.frozen
    assert frozen is not None
    content = bytearray(base.ljust(frozen.size_bytes, b"\0"))
    for index in frozen.chunks():
        chunk = frozen.read_chunk(index)
        start = index * ChunkedImageFile.CHUNK_BYTES
        content[start : start + len(chunk)] = chunk
    return bytes(content)


def test_snapshot_has_what_was_written_before_it(bench: OverlayBench) -> None:
    """Freeze, write on, rebase: the snapshot keeps the past, the disk the present, one layer."""

    async def scenario() -> None:
        overlay = bench.overlay
        await overlay.write(3000, b"before" * 500)
        before = bytes(await overlay.read(0, SIZE_BYTES))
        await overlay.freeze()
        await overlay.freeze()
        assert bench.files.layout() == Layout(SIZE_BYTES, "2", "1", SIZE_BYTES, "image")
        await overlay.write(5000, b"after")
        present = bytes(await overlay.read(0, SIZE_BYTES))
        snapshot = frozen_content(overlay, BASE)
        assert snapshot == before
        assert present[5000:5005] == b"after"
        await overlay.rebase(ImageFile(snapshot), "snapshot")
        await overlay.rebase(ImageFile(snapshot), "snapshot")
        assert overlay.frozen is None
        assert await overlay.read(0, SIZE_BYTES) == present
        bench.base = ImageFile(snapshot)

    present = trio.run(bench.overlay.read, 0, SIZE_BYTES)
    assert present == bench.pristine
    trio.run(scenario)
    assert sorted(os.listdir(bench.directory)) == ["2.bitmap", "2.data", "layout.json"]
    assert os.listdir(bench.live.parent) == ["disk.2.bitmap"]
    before_death = bench.read_all()
    bench.reopen()
    assert bench.read_all() == before_death


def test_write_that_waits_while_a_layer_is_frozen(bench: OverlayBench) -> None:
    """Bytes fetched around a write are fetched again when a freeze put newer ones below."""

    async def scenario() -> None:
        bench.base.cold = True
        bench.base.gate = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bench.overlay.write, 10, b"waiter")
            await trio.testing.wait_all_tasks_blocked()
            await bench.overlay.write(0, b"w" * BLOCK_BYTES)
            await bench.overlay.freeze()
            bench.base.gate.set()

    trio.run(scenario)
    bench.base.cold = False
    found = bench.overlay.read_nowait(0, BLOCK_BYTES)
    assert found == b"w" * 10 + b"waiter" + b"w" * (BLOCK_BYTES - 16)


def test_reads_and_writes_during_a_snapshot(bench: OverlayBench) -> None:
    """Tasks that write and read their own blocks never see anything but what they wrote."""

    async def write_and_read(first: int) -> None:
        for turn in range(1, 20):
            for block in range(first, 64, 8):
                await bench.overlay.write(block * BLOCK_BYTES + 9, bytes([turn]) * 300)
                await trio.lowlevel.checkpoint()
            for block in range(first, 64, 8):
                found = await bench.overlay.read(block * BLOCK_BYTES + 9, 300)
                assert found == bytes([turn]) * 300
            await bench.overlay.flush()

    async def snapshots() -> None:
        base = BASE
        for number in range(5):
            await bench.overlay.freeze()
            base = await trio.to_thread.run_sync(frozen_content, bench.overlay, base)
            bench.base = ImageFile(base)
            await bench.overlay.rebase(bench.base, f"s{number}")

    async def scenario() -> None:
        async with trio.open_nursery() as nursery:
            for first in range(8):
                nursery.start_soon(write_and_read, first)
            nursery.start_soon(snapshots)

    trio.run(scenario)
    content = bench.read_all()
    assert all(content[block * BLOCK_BYTES + 9] == 19 for block in range(64))
    bench.reopen()
    assert bench.read_all() == content


def test_lost_write_is_not_forgotten_with_its_layer(crash_bench: OverlayBench) -> None:
    """After a failed sync of a frozen layer neither its snapshot nor its end is possible."""
    storage = crash_bench.storage
    assert isinstance(storage, CrashStorage)
    overlay = crash_bench.overlay
    overlay.write_nowait(0, b"x")
    trio.run(overlay.freeze)
    assert overlay.frozen is not None
    overlay.frozen.layer.unsynced = True  # type: ignore[union-attr]
    storage.faults["1.data", "fdatasync"] = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        trio.run(overlay.flush)
    with pytest.raises(OSError, match="earlier flush"):
        overlay.frozen.read_chunk(0)
    with pytest.raises(OSError, match="earlier flush"):
        trio.run(overlay.rebase, ImageFile(bytes(SIZE_BYTES)), "wrong")


def test_rebase_without_a_frozen_layer_is_refused(bench: OverlayBench) -> None:
    """There is nothing to end when nothing began."""
    with pytest.raises(Conflict) as caught:
        trio.run(bench.overlay.rebase, ImageFile(bytes(SIZE_BYTES)), "other")
    assert caught.value.code == "nothing-frozen"


@pytest.mark.parametrize("more", [1, BLOCK_BYTES, 40_000 * BLOCK_BYTES])
def test_growth_adds_zeros(bench: OverlayBench, more: int) -> None:
    """A disk that grew, frozen or not, reads zeros behind its old end and can be written there."""
    bench.overlay.write_nowait(SIZE_BYTES - 5, b"ended")
    trio.run(bench.overlay.freeze)
    old = bench.read_all()
    trio.run(bench.overlay.grow, SIZE_BYTES + more)
    assert bench.read_all() == old.ljust(SIZE_BYTES + more, b"\0")
    bench.overlay.write_nowait(SIZE_BYTES + more - 1, b"e")
    bench.reopen()
    assert bench.overlay.size_bytes == SIZE_BYTES + more
    assert bench.read_all() == old.ljust(SIZE_BYTES + more - 1, b"\0") + b"e"
    assert frozen_content(bench.overlay, BASE) == old
    with pytest.raises(ValueError, match="shrink"):
        trio.run(bench.overlay.grow, SIZE_BYTES)


def test_promotion_can_be_interrupted_and_keeps_writes(bench: OverlayBench) -> None:
    """Filling that is cancelled and begun again beside writes ends with a raw file of all bytes."""
    done: list[int] = []

    async def scenario() -> None:
        await bench.overlay.write(100, b"mine")
        with trio.CancelScope() as scope:

            def progress(size: int) -> None:
                done.append(size)
                if len(done) == 3:
                    scope.cancel()

            await bench.overlay.fill(progress, reflink=False)
        assert scope.cancelled_caught
        assert 0 < bench.overlay.local_bytes < SIZE_BYTES
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: bench.overlay.fill(done.append, reflink=False))
            for block in range(0, 64, 3):
                await bench.overlay.write(block * BLOCK_BYTES + 50, b"late")

    trio.run(scenario)
    assert done[-1] == bench.overlay.local_bytes == SIZE_BYTES
    content = bench.read_all()
    assert content[100:104] == b"mine"
    bench.overlay.close()
    transitions.finish_promotion(bench.files)
    transitions.finish_promotion(bench.files)
    assert os.listdir(bench.directory) == ["data"]
    assert bench.files.data(RAW).read_bytes() == content
    assert os.listdir(bench.live.parent) == []
    transitions.freeze_raw(bench.files)
    bench.overlay = bench.open()
    assert bench.read_all() == content
    assert frozen_content(bench.overlay, b"") == content


def test_promotion_of_a_disk_that_needs_its_base_is_refused(bench: OverlayBench) -> None:
    """Nothing becomes raw that lacks a block, and nothing that has a snapshot to be made."""
    trio.run(bench.overlay.freeze)
    bench.overlay.close()
    with pytest.raises(Conflict) as caught:
        transitions.finish_promotion(bench.files)
    assert caught.value.code == "snapshot-pending"
    bench.overlay = bench.open()
    trio.run(bench.overlay.rebase, ImageFile(bytes(SIZE_BYTES)), "other")
    bench.base = ImageFile(bytes(SIZE_BYTES))
    bench.overlay.close()
    with pytest.raises(Conflict) as caught:
        transitions.finish_promotion(bench.files)
    assert caught.value.code == "promotion-incomplete"
    bench.overlay = bench.open()


def test_zeros_over_zeros_take_no_space(tmp_path: Path) -> None:
    """Zeros written where the base is known to be zeros are not stored, others are."""
    content = bytearray(Random(1).randbytes(32 * BLOCK_BYTES))
    content[8 * BLOCK_BYTES : 16 * BLOCK_BYTES] = bytes(8 * BLOCK_BYTES)
    with small_chunks():
        bench = OverlayBench(tmp_path, 64 * BLOCK_BYTES, bytes(content), FILES)
        bench.base = ChunkedImageFile(bytes(content))
        bench.reopen()
        overlay = bench.overlay
        for offset, size in ((8, 8), (32, 32), (9, 1)):
            assert overlay.write_nowait(offset * BLOCK_BYTES, bytes(size * BLOCK_BYTES))
        assert overlay.write_nowait(40 * BLOCK_BYTES + 7, bytes(100))
        assert overlay.local_bytes == 0
        assert overlay.write_nowait(0, bytes(BLOCK_BYTES))
        assert overlay.write_nowait(9 * BLOCK_BYTES, b"x")
        assert overlay.write_nowait(9 * BLOCK_BYTES, bytes(BLOCK_BYTES))
        assert overlay.local_bytes == 2 * BLOCK_BYTES
        assert (
            overlay.read_nowait(0, 10 * BLOCK_BYTES)
            == bytes(BLOCK_BYTES) + content[BLOCK_BYTES : 10 * BLOCK_BYTES]
        )
        overlay.close()


class FullDisk(dict[tuple[str, str], int]):
    """Faults of a file system on which no data file gets another block."""

    def pop(self, key: tuple[str, str], default: object = None) -> int | None:  # type: ignore[override]
        """Return the fault of a call, again and again."""
        return errno.ENOSPC if key == ("1.data", "pwrite") else None


def test_write_waits_for_space(crash_bench: OverlayBench, caplog: pytest.LogCaptureFixture) -> None:
    """On a full disk a write waits and goes on; meanwhile reads and flushes do; one line is said."""
    storage = crash_bench.storage
    assert isinstance(storage, CrashStorage)
    crash_bench.overlay.close()
    told: list[bool] = []
    crash_bench.overlay = crash_bench.open(write_wait_s=30, on_full=lambda: told.append(True))
    clock = trio.testing.MockClock(autojump_threshold=0.01)

    async def keep_full() -> None:
        for _ in range(10):
            await trio.sleep(1)
            assert crash_bench.overlay.read_nowait(0, 10) == BASE[:10]
            await crash_bench.overlay.flush()
        storage.faults = {}

    async def scenario() -> float:
        storage.faults = FullDisk()
        assert not crash_bench.overlay.write_nowait(0, b"x" * BLOCK_BYTES)
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_full)
            await trio.testing.wait_all_tasks_blocked(0.001)
            await crash_bench.overlay.write(0, b"x" * BLOCK_BYTES)
        return trio.current_time() - began

    with caplog.at_level(logging.ERROR):
        assert 10 <= trio.run(scenario, clock=clock) <= 12
    assert len(caplog.records) == 1
    assert told == [True]
    assert crash_bench.overlay.read_nowait(0, 3) == b"xxx"


def test_wait_for_space_has_an_end(crash_bench: OverlayBench) -> None:
    """A write on a disk that stays full fails after its time, and has changed nothing."""
    storage = crash_bench.storage
    assert isinstance(storage, CrashStorage)
    crash_bench.overlay.close()
    crash_bench.overlay = crash_bench.open(write_wait_s=5)
    storage.faults = FullDisk()
    clock = trio.testing.MockClock(autojump_threshold=0)
    with pytest.raises(OSError, match="No space") as caught:
        trio.run(crash_bench.overlay.write, 10, b"x", clock=clock)
    assert caught.value.errno == errno.ENOSPC
    assert crash_bench.read_all() == crash_bench.pristine


def first_release(bench: OverlayBench) -> DiskFiles:
    """Turn a closed disk into what the first release would have left."""
    files = bench.files
    files.data("1").rename(files.data(RAW))
    files.bitmap("1").rename(files.directory / "bitmap")
    files.live("1").rename(files.first_live)
    (files.directory / "layout.json").unlink()
    return files


def test_overlay_of_the_first_release_is_adopted(bench: OverlayBench) -> None:
    """Files without a layout become layer 1 and keep what only the live bitmap knows."""
    bench.overlay.write_nowait(777, b"not flushed")
    content = bench.read_all()
    bench.overlay.close()
    files = first_release(bench)
    assert transitions.is_first_release(files)
    transitions.adopt(files, "image")
    transitions.adopt(files, "image")
    assert sorted(os.listdir(files.directory)) == ["1.bitmap", "1.data", "layout.json"]
    bench.overlay = bench.open()
    assert bench.read_all() == content


@pytest.mark.parametrize("kept_part", [None, 0.0, 0.5, 1.0])
def test_adoption_may_end_anywhere(kept_part: float | None) -> None:
    """Death of the process (None) or the host at any call of an adoption loses nothing flushed."""
    for call in range(100):
        storage = CrashStorage()
        bench = OverlayBench(Path("/crash"), SIZE_BYTES, BASE, storage)
        bench.overlay.write_nowait(777, b"flushed")
        trio.run(bench.overlay.flush)
        content = bench.read_all()
        bench.overlay.close()
        files = bench.files
        storage.rename(files.data("1"), files.data(RAW))
        storage.rename(files.bitmap("1"), files.directory / "bitmap")
        storage.remove(files.directory / "layout.json")
        storage.sync_directory(files.directory)
        storage.arm(call, partial(storage.fail, storage.DIE))
        with suppress(ProcessDied):
            transitions.adopt(files, "image")
        ended = not storage.disarm()
        if kept_part is None:
            storage.process_dies()
        else:
            storage.host_dies(Random(call), kept_part)
        transitions.adopt(files, "image")
        bench.overlay = bench.open()
        assert bench.read_all() == content
        if ended:
            return
    pytest.fail("the adoption never ends")


def test_rollback_forgets_what_was_written(bench: OverlayBench) -> None:
    """A disk rolled back reads the snapshot, at its size, in an empty layer."""
    bench.overlay.write_nowait(0, b"forget me")
    trio.run(bench.overlay.grow, SIZE_BYTES + 5000)
    bench.overlay.close()
    bench.base = ImageFile(Random(9).randbytes(SIZE_BYTES))
    transitions.rollback(bench.files, SIZE_BYTES, "snapshot")
    bench.overlay = bench.open()
    assert bench.read_all() == bench.base.content
    assert bench.overlay.local_bytes == 0
    assert bench.files.layout() == Layout(SIZE_BYTES, "2", None, None, "snapshot")


def test_change_of_a_disk_that_is_open_is_refused(bench: OverlayBench) -> None:
    """Neither rollback nor the end of a promotion can happen under an open disk."""
    changes: list[Callable[[], None]] = [
        lambda: transitions.rollback(bench.files, SIZE_BYTES, "snapshot"),
        lambda: transitions.finish_promotion(bench.files),
    ]
    for change in changes:
        with pytest.raises(Conflict) as caught:
            change()
        assert caught.value.code == "disk-in-use"


def test_base_larger_than_its_disk_is_refused(bench: OverlayBench) -> None:
    """A disk whose base does not fit is damaged, not cut."""
    bench.overlay.close()
    small, bench.base = bench.base, ImageFile(bytes(SIZE_BYTES + 1))
    with pytest.raises(NotVerified):
        bench.open()
    bench.base = small
    bench.overlay = bench.open()


def test_sync_that_fails_in_a_growth_is_remembered(crash_bench: OverlayBench) -> None:
    """The kernel tells of lost writes once; that it told a growth does not make them durable."""
    storage = crash_bench.storage
    assert isinstance(storage, CrashStorage)
    crash_bench.overlay.write_nowait(5000, b"acknowledged, not flushed")
    storage.faults["1.data", "fsync"] = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        trio.run(crash_bench.overlay.grow, SIZE_BYTES + 9000)
    for _ in range(2):
        with pytest.raises(OSError, match="earlier flush"):
            trio.run(crash_bench.overlay.flush)
        # the process ends and another one takes over
        storage.process_dies()
        crash_bench.overlay = crash_bench.open()
    assert crash_bench.overlay.size_bytes == SIZE_BYTES


def test_refused_change_leaves_the_disk_as_it_was(crash_bench: OverlayBench) -> None:
    """When the directory cannot be synced the old layout is put back, for the change was refused."""
    storage, overlay = crash_bench.storage, crash_bench.overlay
    assert isinstance(storage, CrashStorage)
    overlay.write_nowait(5000, b"kept")
    trio.run(overlay.flush)
    storage.faults["disk", "sync"] = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        trio.run(overlay.grow, SIZE_BYTES + 9000)
    crash_bench.reopen()
    assert crash_bench.overlay.size_bytes == SIZE_BYTES
    crash_bench.overlay.close()

    before = crash_bench.files.layout()
    storage.arm(_sync_after_layout(), lambda: storage.fail(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        transitions.rollback(crash_bench.files, SIZE_BYTES, "other")
    assert crash_bench.files.layout() == before
    crash_bench.overlay = crash_bench.open()
    assert trio.run(crash_bench.overlay.read, 5000, 4) == b"kept"


def _sync_after_layout() -> int:
    """Return which call of a rollback is the sync that makes its layout durable."""
    twin = OverlayBench(Path("/twin"), SIZE_BYTES, BASE, CrashStorage())
    twin.overlay.close()
    calls = twin.storage.calls  # type: ignore[attr-defined]
    calls.clear()
    transitions.rollback(twin.files, SIZE_BYTES, "other")
    renamed: int = calls.index(("layout.json", "rename"))
    assert calls[renamed + 1] == ("disk", "sync")
    return renamed + 1


def test_what_a_death_left_goes_though_nobody_opens_the_disk(bench: OverlayBench) -> None:
    """`tidy` removes the files of a layer that is named no more, beside an open disk, no others."""
    files, overlay = bench.files, bench.overlay
    overlay.write_nowait(0, b"written")
    for name in ("7.data", "7.bitmap", "layout.json.new", "notes.txt"):
        (files.directory / name).write_bytes(b"left")
    files.live("7").write_bytes(b"left")
    files.tidy()
    assert sorted(os.listdir(files.directory)) == [
        "1.bitmap", "1.data", "layout.json", "notes.txt",
    ]  # fmt: skip
    assert os.listdir(files.live("1").parent) == [files.live("1").name]
    assert trio.run(overlay.read, 0, 7) == b"written"
