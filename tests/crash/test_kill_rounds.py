"""A guest works on two disks while every process of the appliance is killed, or upgraded.

`make test` plays a handful of rounds; `make crash` what CRASH_ROUNDS says, 200 by default there.
The seed is printed; give it back as CRASH_SEED to choose the same victims and moments again.
"""

import os
import random
from pathlib import Path

import pytest
from support.kill_rounds import Assassin, busy_guest, pause_table
from support.writer import faults, verdicts

ROUNDS = int(os.environ.get("CRASH_ROUNDS", "8"))
SEED = int(os.environ.get("CRASH_SEED", str(random.SystemRandom().randrange(2**32))))

pytestmark = [
    pytest.mark.root,
    pytest.mark.vm,
    pytest.mark.slow,
    pytest.mark.timeout(300 + 30 * ROUNDS),
]


def test_killed_processes_are_a_pause(tmp_path: Path) -> None:
    """Whoever is killed, alone, together or during an upgrade, and under upgrades alone, the guest
    sees no I/O error and no write is lost."""
    print(f"CRASH_SEED={SEED} CRASH_ROUNDS={ROUNDS}")
    with busy_guest(tmp_path) as (appliance, guest):
        assassin = Assassin(appliance, guest, random.Random(SEED))
        try:
            assassin.play(ROUNDS)
        finally:
            print("\n".join(pause_table(assassin.pauses())))
    found = verdicts(guest.console)
    for name, verdict in found.items():
        print(name, verdict)
    assert set(found) == {"overlay", "raw"}
    assert faults(guest.console) == []
    for verdict in found.values():
        assert (verdict.errors, verdict.lost, verdict.wrong) == (0, 0, 0)
        assert verdict.acknowledged > ROUNDS
        assert verdict.synced > 0
