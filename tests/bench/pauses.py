"""What a guest that works on two disks waits when processes are killed below it."""

import random
from collections.abc import Iterable
from pathlib import Path

from support.kill_rounds import Assassin, busy_guest, percentile_99
from support.writer import faults, verdicts

from bench.result import Result

GOALS_S = {("blockd",): 0.3, ("tgtd",): 1.5, ("blockd", "tgtd"): 1.5}
ROUNDS = 22
"""Per victims and sample; with three samples 198 kills."""


def measure(directory: Path, samples: int) -> Iterable[Result]:
    """Kill while the appliance is well; a sample is the p99 of its rounds, the longest wait."""
    waits: dict[tuple[str, str], list[float]] = {}
    for number in range(samples):
        directory_of_run = directory / str(number)
        directory_of_run.mkdir()
        with busy_guest(directory_of_run) as (appliance, guest):
            chance = random.Random(number)
            assassin = Assassin(appliance, guest, chance, list(GOALS_S), again_chance=0.0)
            assassin.play(ROUNDS * len(GOALS_S))
            for key, felt in assassin.pauses().items():
                waits.setdefault(key, []).append(percentile_99(felt))
        found = verdicts(guest.console)
        lost = [item for item in found.values() if item.errors or item.lost or item.wrong]
        if lost or faults(guest.console):
            raise RuntimeError(f"the guest met errors: {found}")
    for victims, goal_s in GOALS_S.items():
        label = "+".join(victims)
        for disk in ("overlay", "raw"):
            name = f"{label} killed, {disk} disk, longest pause of {ROUNDS}"
            yield Result(name, "s", waits[label, disk], goal_s, at_least=False)
