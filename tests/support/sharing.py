"""How `make test` shares the files of tests among its workers (pytest-xdist).

A file stays with one worker, as its fixtures do. Long files go first, so that none is left for the
end; and while one worker emulates a machine the others do something else, as two emulators at once
would starve each other of the processors, and both would make the demonstration's images.
"""

from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from functools import cache
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

KERNEL_GUEST = "files of the kernel guest"
"""The unit of all files that use the one guest of `tests/vm/conftest.py`."""


class Kind(IntEnum):
    """What the tests of a file do with the machine, in the order in which they are begun."""

    MACHINE = 0
    LONG = 1
    SHORT = 2


@cache
def kind_of_file(path: Path) -> Kind:
    """Return the kind of a file of tests, by the markers that its text names."""
    text = path.read_text()
    if "mark.vm" in text:
        return Kind.MACHINE
    return Kind.LONG if "mark.slow" in text else Kind.SHORT


@cache
def unit_of_file(path: Path) -> str:
    """Return what a file is given to a worker with: itself, or all that share one guest."""
    return KERNEL_GUEST if "kernel_guest:" in path.read_text() else str(path)


def choose(waiting: Sequence[str], kinds: Mapping[str, Kind], busy: Iterable[Kind]) -> str:
    """Return which of the waiting units a worker begins; `busy` is what the others are at."""
    crowded = Kind.MACHINE in busy
    return min(waiting, key=lambda unit: (crowded and kinds[unit] is Kind.MACHINE, kinds[unit]))


class Sharing(LoadScopeScheduling):  # type: ignore[misc]  # it has no types
    """Gives workers one unit after another as `choose` says."""

    def __init__(self, config: pytest.Config, log: Producer) -> None:
        super().__init__(config, log)
        self._root = config.rootpath
        self._kinds: dict[str, Kind] = {}

    def _split_scope(self, nodeid: str) -> str:
        path = self._root / nodeid.partition("::")[0]
        unit = unit_of_file(path)
        self._kinds[unit] = kind_of_file(path)
        return unit

    def _assign_work_unit(self, node: WorkerController) -> None:
        busy = {
            self._kinds[unit]
            for other, units in self.assigned_work.items()
            if other is not node
            for unit, tests in units.items()
            if not all(tests.values())
        }
        chosen = choose(list(self.workqueue), self._kinds, busy)
        self.workqueue.move_to_end(chosen, last=False)
        super()._assign_work_unit(node)
