"""I/O of guests as the FUSE tree sees it: how often, how much, how long, by disk and in all.

Counted by the event loop with every request, so it is lists of numbers; `drain` makes counts of
them. Raw disks do not come this way: tgtd reads and writes their files itself.
"""

from bisect import bisect_left
from collections import defaultdict

from stratocache.fs.attributes import is_disk, number_of
from stratocache.fs.counts import DURATION_BOUNDS_S, Counted, Durations, Key

READ, WRITE, FLUSH = "read", "write", "flush"
DISK_COUNTERS = ("disk_requests", "disk_bytes", "disk_seconds", "disk_errors")
"""By number of the disk and operation."""


class _Operation:
    """Requests of one kind, since the last `drain`."""

    __slots__ = ("classes", "disks", "errors")

    def __init__(self) -> None:
        self.disks: dict[int, list[float]] = {}
        """By handle: requests, bytes, seconds."""
        self.classes = [0] * (len(DURATION_BOUNDS_S) + 1)
        self.errors: defaultdict[int, int] = defaultdict(int)

    def note(self, handle: int, size_bytes: int, seconds: float) -> None:
        """Count a request that was answered."""
        disk = self.disks.get(handle)
        if disk is None:
            disk = self.disks[handle] = [0, 0, 0.0]
        disk[0] += 1
        disk[1] += size_bytes
        disk[2] += seconds
        self.classes[bisect_left(DURATION_BOUNDS_S, seconds)] += 1


class DiskIo:
    """What has come since the last `drain`; belongs to one trio loop."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.read = _Operation()
        self.write = _Operation()
        self.flush = _Operation()

    def failed(self, handler: str, handle: int) -> None:
        """Count a request of the tree's handler of that name which was answered by an error."""
        operation = {"read": self.read, "write": self.write, "fsync": self.flush}.get(handler)
        if operation is not None:
            operation.errors[handle] += 1

    def drain(self) -> Counted:
        """Return the counts, by number of the disk, and begin anew."""
        operations = {READ: self.read, WRITE: self.write, FLUSH: self.flush}
        self._begin()
        found = Counted()
        for name, operation in operations.items():
            sum_s = 0.0
            for handle, (requests, size_bytes, seconds) in operation.disks.items():
                sum_s += seconds
                if is_disk(handle):
                    values = (requests, size_bytes, seconds)
                    for counter, value in zip(DISK_COUNTERS, values, strict=False):
                        found.counters[_key(counter, handle, name)] = value
            for handle, errors in operation.errors.items():
                if is_disk(handle):
                    found.counters[_key("disk_errors", handle, name)] = errors
            if operation.errors:
                found.counters[Key(("io_errors", name))] = sum(operation.errors.values())
            if any(operation.classes):
                found.durations[Key(("io_duration", name))] = Durations(operation.classes, sum_s)
        return found


def _key(counter: str, handle: int, operation: str) -> Key:
    return Key((counter, str(number_of(handle)), operation))
