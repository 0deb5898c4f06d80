"""The cache against a model: fetches, pins, clones, launches, evictions, withdrawals, rot, lost
origins and crashes.

What must be readable is, byte for byte; what cannot be repaired is an error, never other bytes; of
what was withdrawn nothing new is made; in the end every byte in the cache's rooms is accounted for.
`make crash` runs KEEP_EXAMPLES histories from KEEP_SEED on, and plants every bug.
"""

import os

import pytest
from support.keeping_machine import KeepingMachine, run_histories

EXAMPLES = int(os.environ.get("KEEP_EXAMPLES", "6"))
SEED = int(os.environ.get("KEEP_SEED", "1"))
PLANTED_MAX = 100
"""Histories within which a planted bug must be found."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180 + 40 * EXAMPLES)]


def test_no_history_breaks_the_cache(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing that is held goes, nothing wrong is read, nothing is left over."""

    class Machine(KeepingMachine):
        pass

    run_histories(Machine, EXAMPLES, SEED)
    with capsys.disabled():
        print(f"\nseed {SEED}: {Machine.histories} histories")
    assert Machine.histories >= EXAMPLES
