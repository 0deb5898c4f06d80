"""Histories of a disk: any requests, changes, faults and deaths, drawn by Hypothesis."""

import sys
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from stratocache.fs.bitmap import BLOCK_BYTES
from support.crash_storage import CrashStorage
from support.disk_world import NOTHING, DiskWorld, Plan
from support.overlays import small_chunks

STEPS = 25

_KEPT = st.sampled_from([0.0, 0.5, 1.0])
_CUTS = st.builds(Plan, st.just("host"), st.just(0), _KEPT, st.booleans())
_INTERRUPTIONS = st.builds(
    Plan,
    st.sampled_from(["process", "host", "error", "full", "write"]),
    st.one_of(st.integers(0, 5), st.integers(0, 40)),
    _KEPT,
    st.booleans(),
)
PLANS = st.one_of(st.just(NOTHING), _INTERRUPTIONS)


class DiskMachine(RuleBasedStateMachine):
    """Any history of one disk; the assertions are those of `DiskWorld`."""

    storage_type: type[CrashStorage] = CrashStorage
    histories = 0
    interrupted = 0

    def __init__(self) -> None:
        super().__init__()
        type(self).histories += 1
        self.chunks = small_chunks()
        self.chunks.__enter__()

    @initialize(
        blocks=st.integers(1, 30),
        tail=st.sampled_from([0, 1, 511, 512, 4095]),
        base_part=st.sampled_from([None, 0.0, 0.3, 0.77, 1.0]),
        zeros=st.booleans(),
        seed=st.integers(0, 2**16),
    )
    def create(
        self, blocks: int, tail: int, base_part: float | None, zeros: bool, seed: int
    ) -> None:
        """Make a disk of any size, raw or over a base of any size."""
        size = blocks * BLOCK_BYTES + tail
        base = None
        self.storage = self.storage_type()
        self.world = DiskWorld(self.storage, size, base, seed)
        if base_part is not None:
            content = bytearray(self.world.random.randbytes(int(size * base_part)))
            if zeros:
                content[8 * BLOCK_BYTES : 24 * BLOCK_BYTES] = bytes(
                    len(content[8 * BLOCK_BYTES : 24 * BLOCK_BYTES])
                )
            self.storage = self.storage_type()
            self.world = DiskWorld(self.storage, size, bytes(content), seed)

    def _range(self, data: st.DataObject, size_max: int) -> tuple[int, int]:
        length = len(self.world.content)
        offset = data.draw(st.integers(0, length - 1))
        offset -= offset % data.draw(st.sampled_from([1, 512, BLOCK_BYTES]))
        return offset, data.draw(st.integers(1, min(size_max, length - offset)))

    @rule(data=st.data(), cold=st.booleans(), plan=PLANS)
    def write(self, data: st.DataObject, cold: bool, plan: Plan) -> None:
        """Write anywhere."""
        offset, size = self._range(data, 5 * BLOCK_BYTES)
        self.world.write(offset, self.world.random.randbytes(size), plan, cold=cold)

    @rule(data=st.data())
    def write_zeros(self, data: st.DataObject) -> None:
        """Write zeros anywhere."""
        offset, size = self._range(data, 20 * BLOCK_BYTES)
        self.world.write(offset, bytes(size), NOTHING, cold=False)

    @rule(data=st.data(), cold=st.booleans(), plan=PLANS)
    def read(self, data: st.DataObject, cold: bool, plan: Plan) -> None:
        """Read anywhere."""
        offset = data.draw(st.integers(0, len(self.world.content) + 10))
        self.world.read(offset, data.draw(st.integers(0, 9 * BLOCK_BYTES)), plan, cold=cold)

    @rule(plan=PLANS)
    def flush(self, plan: Plan) -> None:
        """Flush."""
        self.world.flush(plan)

    @rule(plan=PLANS)
    def freeze(self, plan: Plan) -> None:
        """Begin a snapshot."""
        self.world.freeze(plan)

    @precondition(lambda self: self.world.overlay is not None and self.world.overlay.frozen)
    @rule(plan=PLANS)
    def absorb(self, plan: Plan) -> None:
        """End it."""
        self.world.absorb(plan)

    @precondition(lambda self: self.world.snapshots)
    @rule(data=st.data(), plan=PLANS)
    def rollback(self, data: st.DataObject, plan: Plan) -> None:
        """Go back to any snapshot."""
        self.world.rollback(data.draw(st.sampled_from(self.world.snapshots)), plan)

    @precondition(lambda self: self.world.snapshots)
    @rule(data=st.data())
    def clone(self, data: st.DataObject) -> None:
        """Clone any snapshot."""
        self.world.clone(data.draw(st.sampled_from(self.world.snapshots)))

    @rule(more=st.integers(0, 9000), plan=PLANS)
    def grow(self, more: int, plan: Plan) -> None:
        """Grow."""
        self.world.grow(len(self.world.content) + more, plan)

    @precondition(lambda self: self.world.overlay is not None)
    @rule(plan=PLANS, reflink=st.booleans())
    def fill(self, plan: Plan, reflink: bool) -> None:
        """Promote, up to the switch."""
        self.world.fill(plan, reflink=reflink)

    @precondition(lambda self: self.world.overlay is not None)
    @rule(plan=PLANS)
    def finish_promotion(self, plan: Plan) -> None:
        """Switch to the raw file."""
        self.world.finish_promotion(plan)

    @rule()
    def process_dies(self) -> None:
        """Let another process take over."""
        self.world.process_dies()

    @rule(plan=_CUTS)
    def host_dies(self, plan: Plan) -> None:
        """Cut the power."""
        self.world.host_dies(plan)

    def teardown(self) -> None:
        """Compare a last time."""
        try:
            # after a failure the disk is in no state to be compared
            if hasattr(self, "world") and sys.exc_info()[0] is None:
                type(self).interrupted += self.world.interrupted
                self.world.close()
        finally:
            self.chunks.__exit__(None, None, None)


def run_histories(machine: type[DiskMachine], count: int, seed: int, **changes: Any) -> None:
    """Run that many histories; a failure is shrunk and printed as the calls that repeat it."""
    hypothesis.seed(seed)(machine)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=count,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            print_blob=True,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            **changes,
        ),
    )


FIND_ONLY = {"phases": [Phase.generate]}
"""For `run_histories`: a failure is not shrunk."""
