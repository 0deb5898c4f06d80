"""Histories of a disk against a model in memory: every storage call is a possible end.

CRASH_HISTORIES is how many to run (`make crash` runs 10,000), CRASH_SEED the first seed. A failure
is shrunk and printed as the calls that repeat it. Two sorts of proof stand beside the histories:
every operation with every ending at each of its calls, and bugs that are planted to be found.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from support.crash_storage import CrashStorage
from support.disk_histories import FIND_ONLY, DiskMachine, run_histories
from support.disk_world import NOTHING, DiskWorld, Interruption, Plan
from support.overlays import small_chunks

from stratocache.fs.bitmap import BLOCK_BYTES
from stratocache.fs.stack import Layer

HISTORIES = int(os.environ.get("CRASH_HISTORIES", "150"))
SEED = int(os.environ.get("CRASH_SEED", "1"))
BATCH = 500
PLANTED_SEED = int(os.environ.get("CRASH_SEED", "5"))
"""One that finds each planted bug soon; seeds 1 to 6 needed 24 to 1,022 histories for the rarest."""
PLANTED_MAX = 1000
"""Histories within which a planted bug must be found."""
CALLS_MAX = 200

SIZE_BYTES = 20 * BLOCK_BYTES + 700
BASE = Random(1).randbytes(18 * BLOCK_BYTES + 100)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Errors are what these tests are made of; nobody needs a line for each."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(SEED, SEED + -(-HISTORIES // BATCH)))
def test_no_history_loses_a_byte(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever happens in whatever order, all that was promised is there."""

    class Machine(DiskMachine):
        pass

    count = min(BATCH, HISTORIES - (seed - SEED) * BATCH)
    began = time.monotonic()
    run_histories(Machine, count, seed)
    with capsys.disabled():
        print(
            f"\nseed {seed}: {Machine.histories} histories, {Machine.interrupted} operations "
            f"interrupted, {time.monotonic() - began:.0f} s"
        )
    assert Machine.histories >= count


# Bugs to be found.


def _bitmap_first(layer: Layer, pages: dict[int, bytes]) -> None:
    layer.bitmap.write(layer._durable, pages)
    layer.data.fdatasync()


def _no_sync(layer: Layer, pages: dict[int, bytes]) -> None:
    layer.bitmap.write(layer._durable, pages)


class SameBootStorage(CrashStorage):
    """A host whose boots cannot be told apart, so that an old live bitmap looks new."""

    def boot_id(self) -> bytes:
        """Return what the boot before was called."""
        return bytes(16)


class UnsyncedNamesStorage(CrashStorage):
    """A host where nobody syncs a directory."""

    created = 3
    """Calls that make the disk; what follows is left out."""

    def sync_directory(self, directory: Path) -> None:
        """Sync while the disk is being made, then never again."""
        if self.created:
            self.created -= 1
            super().sync_directory(directory)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("bug", ["bitmap-first", "no-sync", "stale-live", "names-unsynced"])
def test_planted_bug_is_found(
    bug: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The histories find an engine, or a storage, that does one thing wrong."""

    class Machine(DiskMachine):
        pass

    if bug == "bitmap-first":
        monkeypatch.setattr(Layer, "_sync", _bitmap_first)
    elif bug == "no-sync":
        monkeypatch.setattr(Layer, "_sync", _no_sync)
    elif bug == "stale-live":
        Machine.storage_type = SameBootStorage
    else:
        Machine.storage_type = UnsyncedNamesStorage
    with pytest.raises((AssertionError, FileNotFoundError)):
        run_histories(Machine, PLANTED_MAX, PLANTED_SEED, **FIND_ONLY)
    with capsys.disabled():
        print(f"\n{bug}: found by history {Machine.histories}")
    assert Machine.histories <= PLANTED_MAX


# Every operation with every ending at each of its calls.


def _overlay() -> DiskWorld:
    """An overlay with blocks that were flushed, and others that were not."""
    world = DiskWorld(CrashStorage(), SIZE_BYTES, BASE, seed=2)
    for offset in (100, 3 * BLOCK_BYTES, 17 * BLOCK_BYTES + 5):
        world.write(offset, world.random.randbytes(5000), NOTHING, cold=False)
    world.flush(NOTHING)
    world.write(0, world.random.randbytes(9000), NOTHING, cold=False)
    return world


def _frozen() -> DiskWorld:
    world = _overlay()
    world.freeze(NOTHING)
    world.write(2000, world.random.randbytes(6000), NOTHING, cold=False)
    return world


def _with_snapshot() -> DiskWorld:
    world = _frozen()
    world.absorb(NOTHING)
    return world


def _filled() -> DiskWorld:
    world = _with_snapshot()
    world.fill(NOTHING, reflink=False)
    return world


def _raw() -> DiskWorld:
    world = _filled()
    world.finish_promotion(NOTHING)
    world.write(700, world.random.randbytes(9000), NOTHING, cold=False)
    assert world.form == "raw"
    return world


OPERATIONS: dict[str, tuple[Callable[[], DiskWorld], Callable[[DiskWorld, Plan], None]]] = {
    "write": (_overlay, lambda w, plan: w.write(8000, b"new" * 9000, plan, cold=True)),
    "read": (_overlay, lambda w, plan: w.read(0, SIZE_BYTES, plan, cold=True)),
    "flush": (_frozen, lambda w, plan: w.flush(plan)),
    "freeze": (_overlay, lambda w, plan: w.freeze(plan)),
    "absorb": (_frozen, lambda w, plan: w.absorb(plan)),
    "grow": (_frozen, lambda w, plan: w.grow(SIZE_BYTES + 70_000, plan)),
    "fill": (_frozen, lambda w, plan: w.fill(plan, reflink=False)),
    "fill-by-sharing": (_with_snapshot, lambda w, plan: w.fill(plan, reflink=True)),
    "finish-promotion": (_filled, lambda w, plan: w.finish_promotion(plan)),
    "rollback": (_with_snapshot, lambda w, plan: w.rollback(w.snapshots[0], plan)),
    "freeze-raw": (_raw, lambda w, plan: w.freeze(plan)),
    "rollback-raw": (_raw, lambda w, plan: w.rollback(w.snapshots[0], plan)),
}

ENDINGS: list[tuple[Interruption, float, bool]] = [
    ("process", 0.0, False),
    ("host", 0.0, False),
    ("host", 0.5, True),
    ("host", 1.0, False),
    ("error", 0.0, False),
    ("full", 0.0, False),
    ("write", 0.0, False),
]


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_call_may_be_the_last(name: str) -> None:
    """A death, an error, a full disk or another's write at each call leaves a disk that goes on."""
    prepare, operate = OPERATIONS[name]
    with small_chunks():
        for what, kept_part, keep_live in ENDINGS:
            for call in range(CALLS_MAX):
                world = prepare()
                before = world.interrupted
                operate(world, Plan(what, call, kept_part, keep_live))
                interrupted = world.interrupted > before
                # the disk goes on: the next snapshot, growth and power cut are as ever
                world.host_dies(Plan("host", 0, kept_part))
                world.write(50, b"after", NOTHING, cold=False)
                world.freeze(NOTHING)
                world.absorb(NOTHING)
                world.host_dies(Plan("host", 0, kept_part))
                world.close()
                if not interrupted:
                    break
            else:
                pytest.fail("the operation never ends")
