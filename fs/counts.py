"""What one process counts for /metrics: in memory, and in a file of RUN_DIR/counts.

Whoever answers /metrics adds up the files of all processes. A process that starts goes on from the
file that the one before left, so that counters grow until RUN_DIR goes; what a kill costs is what
had not been written, `WRITE_INTERVAL_S` at most, and was never shown to anybody. Not synced: it is
worth nothing after a reboot.
"""

import fcntl
import json
import logging
import os
import threading
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count as numbers
from pathlib import Path
from typing import Any, NewType

log = logging.getLogger(__name__)

WRITE_INTERVAL_S = 2.0
DURATION_BOUNDS_S = (
    0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0
)  # fmt: skip
"""Upper ends, included, of the classes of every histogram; a last class has the rest."""
_VERSION = 1
_FILE_BYTES_MAX = 16 * 1024**2
_SLOTS_MAX = 256

Key = NewType("Key", tuple[str, ...])
"""A name, then the values of its labels."""


@dataclass
class Durations:
    """A histogram of seconds."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(DURATION_BOUNDS_S) + 1))
    """One for each class."""
    sum_s: float = 0.0

    def add(self, other: "Durations") -> None:
        """Take in another histogram."""
        self.counts = [mine + new for mine, new in zip(self.counts, other.counts, strict=True)]
        self.sum_s += other.sum_s


@dataclass
class Counted:
    """Counters and histograms."""

    counters: dict[Key, float] = field(default_factory=dict)
    durations: dict[Key, Durations] = field(default_factory=dict)

    def add(self, other: "Counted") -> None:
        """Take in what another process has counted."""
        for key, value in other.counters.items():
            self.counters[key] = self.counters.get(key, 0) + value
        for key, durations in other.durations.items():
            self.durations.setdefault(key, Durations()).add(durations)

    def to_json(self) -> str:
        """Return what a file holds."""
        return json.dumps({
            "version": _VERSION,
            "counters": [[*key, value] for key, value in self.counters.items()],
            "durations": [[*key, item.counts, item.sum_s] for key, item in self.durations.items()],
        })  # fmt: skip

    @classmethod
    def from_json(cls, content: bytes) -> "Counted":
        """Read what a file holds; raises `ValueError` for what no process of ours has written."""
        try:
            return cls._parse(json.loads(content))
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not counts: {error!r}") from error

    @classmethod
    def _parse(cls, fields: Any) -> "Counted":
        if fields["version"] != _VERSION:
            raise ValueError(f"counts of version {fields['version']}")
        found = cls()
        for *key, value in fields["counters"]:
            found.counters[Key(tuple(map(str, key)))] = float(value)
        for *key, counts, sum_s in fields["durations"]:
            if len(counts) == len(DURATION_BOUNDS_S) + 1:
                found.durations[Key(tuple(map(str, key)))] = Durations(
                    list(map(int, counts)), float(sum_s)
                )
        return found


class Counts:
    """The counts of this process; any thread may use them.

    `name` is the process's in RUN_DIR/counts, which one process at a time has.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self._path = directory / f"{name}.json"
        self._lock = threading.Lock()
        self._followed: dict[Key, float] = {}
        self._written = ""
        self._counted = _read(self._path)

    def add(self, name: str, *labels: str, by: float = 1) -> None:
        """Add to a counter."""
        key = Key((name, *labels))
        with self._lock:
            self._counted.counters[key] = self._counted.counters.get(key, 0) + by

    def follow(self, total: float, name: str, *labels: str) -> None:
        """Let a counter grow as another one does, which was 0 when this process started."""
        key = Key((name, *labels))
        grown = total - self._followed.get(key, 0)
        self._followed[key] = total
        if grown:
            self.add(name, *labels, by=grown)

    def observe(self, seconds: float, name: str, *labels: str) -> None:
        """Add a duration to a histogram."""
        key = Key((name, *labels))
        with self._lock:
            item = self._counted.durations.get(key)
            if item is None:
                item = self._counted.durations[key] = Durations()
            item.counts[bisect_left(DURATION_BOUNDS_S, seconds)] += 1
            item.sum_s += seconds

    def take_in(self, counted: Counted) -> None:
        """Add what was counted elsewhere in this process."""
        with self._lock:
            self._counted.add(counted)

    def keep_labels(self, names: Iterable[str], values: set[str]) -> None:
        """Forget counters of some names whose first label is not among the values."""
        names = frozenset(names)
        with self._lock:
            for key in [key for key in self._counted.counters if key[0] in names]:
                if key[1] not in values:
                    del self._counted.counters[key]

    def write(self) -> None:
        """Replace the file when anything has changed; never raises for what the system refuses."""
        with self._lock:
            content = self._counted.to_json()
            if content == self._written:
                return
            self._written = content
            fresh = self._path.with_suffix(".new")
            try:
                fresh.write_text(content)
                fresh.rename(self._path)
            except OSError as error:
                log.warning("%s cannot be written: %s", self._path, error)


def read_all(directory: Path) -> Counted:
    """Return what the processes of an appliance have counted, added up; blocks."""
    found = Counted()
    for path in sorted(directory.glob("*.json")):
        found.add(_read(path))
    return found


def _read(path: Path) -> Counted:
    try:
        with path.open("rb") as file:
            return Counted.from_json(file.read(_FILE_BYTES_MAX))
    except FileNotFoundError:
        return Counted()
    except (OSError, ValueError) as error:
        log.warning("%s is begun anew: %s", path, error)
        return Counted()


def take_slot(directory: Path, prefix: str) -> str:
    """Return the first name, such as `api-0`, that no living process has; it is ours until we end.

    Raises `OSError`.
    """
    for number in numbers():
        name = f"{prefix}-{number}"
        descriptor = os.open(
            directory / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            if number >= _SLOTS_MAX:
                raise
            continue
        return name  # the descriptor stays open, and the lock with it
    raise AssertionError
