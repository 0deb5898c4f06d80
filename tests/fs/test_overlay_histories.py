"""Histories of an overlay: any requests, faults and deaths, against a model in memory."""

import errno
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
import trio
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from support.crash_storage import SECTOR_BYTES, CrashStorage, ProcessDied
from support.overlays import OverlayBench

from stratocache.fs.bitmap import BLOCK_BYTES

FLUSH_CALLS = [("data", "fdatasync"), ("bitmap", "pwrite"), ("bitmap", "fdatasync")]


class OverlayMachine(RuleBasedStateMachine):
    """Any requests, faults and deaths.

    The model is `content`, what reads must see, and per sector what a power cut may leave: the
    flushed content or any version acknowledged since.
    """

    @initialize(
        blocks=st.integers(1, 40),
        tail=st.sampled_from([0, 1, 511, 512, 4095]),
        base_part=st.sampled_from([0.0, 0.3, 0.77, 1.0]),
        seed=st.integers(0, 2**16),
    )
    def create(self, blocks: int, tail: int, base_part: float, seed: int) -> None:
        """Make a disk of any size over a base of any size."""
        size = blocks * BLOCK_BYTES + tail
        self.random = Random(seed)
        self.storage = CrashStorage()
        base = self.random.randbytes(int(size * base_part))
        self.bench = OverlayBench(Path("/crash"), size, base, self.storage)
        self.content = self.bench.pristine
        self.data_failed = False
        self.flushed()

    def flushed(self) -> None:
        """Note that all content is durable."""
        self.durable = bytes(self.content)
        self.versions: dict[int, set[bytes]] = defaultdict(set)

    def note_versions(self, offset: int, size: int) -> None:
        """Note that the sectors of a range may be found as they are now."""
        for start in range(offset - offset % SECTOR_BYTES, offset + size, SECTOR_BYTES):
            self.versions[start].add(bytes(self.content[start : start + SECTOR_BYTES]))

    @rule(data=st.data(), cold=st.booleans())
    def write(self, data: st.DataObject, cold: bool) -> None:
        """Write anywhere, with the base open or not."""
        size_bytes = self.bench.size_bytes
        offset = data.draw(st.integers(0, size_bytes - 1))
        offset -= offset % data.draw(st.sampled_from([1, 512, BLOCK_BYTES]))
        size = data.draw(st.integers(0, min(5 * BLOCK_BYTES, size_bytes - offset)))
        written = self.random.randbytes(size)
        self.bench.base.cold = cold
        trio.run(self.bench.overlay.write, offset, written)
        self.content[offset : offset + size] = written
        self.note_versions(offset, size)

    @rule(data=st.data(), cold=st.booleans())
    def read(self, data: st.DataObject, cold: bool) -> None:
        """Read anywhere, past the end too."""
        offset = data.draw(st.integers(0, self.bench.size_bytes + 10))
        size = data.draw(st.integers(0, 9 * BLOCK_BYTES))
        self.bench.base.cold = self.storage.cold = cold
        found = trio.run(self.bench.overlay.read, offset, size)
        assert found == self.content[offset : offset + size]

    @rule()
    def flush(self) -> None:
        """Flush; a disk that lost data once refuses for good."""
        try:
            trio.run(self.bench.overlay.flush)
        except OSError as error:
            assert error.errno == errno.EIO
            assert self.data_failed
        else:
            assert not self.data_failed
            self.flushed()

    @rule(fault=st.sampled_from(FLUSH_CALLS))
    def flush_that_fails(self, fault: tuple[str, str]) -> None:
        """Flush with one failing call; it is reported when it was reached."""
        self.storage.faults[fault] = errno.EIO
        try:
            trio.run(self.bench.overlay.flush)
        except OSError as error:
            assert error.errno == errno.EIO
            if fault not in self.storage.faults:
                self.data_failed |= fault[0] == "data"
        else:
            assert fault in self.storage.faults
            self.flushed()
        self.storage.faults.clear()

    @rule(data=st.data())
    def write_that_fails(self, data: st.DataObject) -> None:
        """Write into a data file that fails; nothing has changed."""
        offset = data.draw(st.integers(0, self.bench.size_bytes - 1))
        self.storage.faults["data", "pwrite"] = errno.ENOSPC
        with pytest.raises(OSError, match="No space"):
            trio.run(self.bench.overlay.write, offset, b"x")

    @rule()
    def process_dies(self) -> None:
        """Open again; everything acknowledged is there."""
        self.bench.reopen()

    @rule(fault=st.sampled_from(FLUSH_CALLS))
    def process_dies_in_a_flush(self, fault: tuple[str, str]) -> None:
        """Die at any call of a flush; what was acknowledged is there and can still be flushed."""
        self.storage.faults[fault] = self.storage.DIE
        with suppress(ProcessDied, OSError):
            trio.run(self.bench.overlay.flush)
        self.storage.faults.clear()
        self.bench.reopen()

    @rule(data=st.data())
    def process_dies_in_a_write(self, data: st.DataObject) -> None:
        """Die in the middle of a write; each byte is the old or the new one."""
        size_bytes = self.bench.size_bytes
        offset = data.draw(st.integers(0, size_bytes - 1))
        written = self.random.randbytes(
            data.draw(st.integers(1, min(3 * BLOCK_BYTES, size_bytes - offset)))
        )
        self.storage.faults["data", "pwrite"] = self.storage.DIE
        with pytest.raises(ProcessDied):
            trio.run(self.bench.overlay.write, offset, written)
        self.bench.reopen()
        self.storage.cold = self.bench.base.cold = False
        found = self.bench.read_all()
        wanted = bytearray(self.content)
        wanted[offset : offset + len(written)] = written
        assert all(
            byte in (old, new) for byte, old, new in zip(found, self.content, wanted, strict=True)
        )
        self.content = bytearray(found)
        self.note_versions(offset, len(written))

    @rule(kept_part=st.sampled_from([0.0, 0.5, 1.0]))
    def host_dies(self, kept_part: float) -> None:
        """Cut the power; everything flushed is there, and no sector is one that nobody wrote."""
        self.bench.overlay.close()
        self.storage.host_dies(self.random, kept_part)
        self.bench.overlay = self.bench.open()
        self.storage.cold = self.bench.base.cold = False
        found = self.bench.read_all()
        for start in range(0, len(found), SECTOR_BYTES):
            sector = slice(start, start + SECTOR_BYTES)
            assert found[sector] in {self.durable[sector]} | self.versions[start]
        self.content = bytearray(found)
        self.data_failed = False
        self.flushed()


OverlayMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestOverlayMachine = OverlayMachine.TestCase
