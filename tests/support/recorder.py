"""A storage on real files that writes down what it does, so that any power cut can be replayed.

The log has one record for each effect that a crash can lose: bytes and lengths of files, names of
one directory, and begin and end of each sync. `Recording.replay` builds the directory that a power
cut at some position leaves: what a sync that had ended covers is there; of everything later any
part may be there, sector by sector and name by name. Live bitmaps are not recorded: they are lost.
"""

import itertools
import os
import struct
import threading
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from stratocache.fs.storage import Buffer, FileStorage, OpenFile

SECTOR_BYTES = 512
DIRECTORY = 0
"""As a file: the directory itself, whose content is names."""

_RECORD = struct.Struct("<cIQQI")
_WRITE, _ZERO, _SIZE, _NAME, _BEGIN, _END = b"W", b"Z", b"S", b"N", b"B", b"E"


class Log:
    """The log file, appended to by one process; its length is the position in time."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._tickets = itertools.count(1)
        self.lock = threading.RLock()

    def append(self, kind: bytes, file: int, at: int, size: int, content: Buffer = b"") -> None:
        """Add one record, whole."""
        head = _RECORD.pack(kind, file, at, size, len(content))
        assert os.writev(self._file, [head, content]) == len(head) + len(content)

    def sync_begins(self, file: int) -> int:
        """Note that a sync of a file begins; return its ticket for `sync_ended`."""
        with self.lock:
            ticket = next(self._tickets)
            self.append(_BEGIN, file, ticket, 0)
        return ticket

    def sync_ended(self, file: int, ticket: int) -> None:
        """Note that a sync has ended without an error."""
        with self.lock:
            self.append(_END, file, ticket, 0)


class RecordedFile(OpenFile):
    """An open file that writes down what is written into it."""

    def __init__(self, opened: OpenFile, log: Log, number: int) -> None:
        super().__init__(os.dup(opened._descriptor))
        opened.close()  # the lock belongs to the duplicate too (flock(2))
        self._log = log
        self._number = number

    def pwrite(self, buffer: Buffer, offset: int) -> None:
        """Write and record."""
        with self._log.lock:
            super().pwrite(buffer, offset)
            self._log.append(_WRITE, self._number, offset, len(buffer), bytes(buffer))

    def zero(self, offset: int, size: int) -> None:
        """Punch and record."""
        with self._log.lock:
            OpenFile.zero(self, offset, size)
            self._log.append(_ZERO, self._number, offset, size)

    def extend(self, size_bytes: int, *, reserve: bool) -> None:
        """Make longer, sync and record."""
        with self._log.lock:
            self._log.append(_SIZE, self._number, 0, max(self.size(), size_bytes))
        ticket = self._log.sync_begins(self._number)
        super().extend(size_bytes, reserve=reserve)
        self._log.sync_ended(self._number, ticket)

    def cut(self, size_bytes: int) -> None:
        """Make shorter, sync and record."""
        with self._log.lock:
            self._log.append(_SIZE, self._number, 0, min(self.size(), size_bytes))
        ticket = self._log.sync_begins(self._number)
        super().cut(size_bytes)
        self._log.sync_ended(self._number, ticket)

    def share(self, source: int, source_offset: int, size: int, offset: int) -> None:
        """Share extents, which a log of bytes sees as a write."""
        with self._log.lock:
            super().share(source, source_offset, size, offset)
            self._log.append(_WRITE, self._number, offset, size, self.pread(size, offset))

    def fdatasync(self) -> None:
        """Sync and record begin and end: what is written meanwhile is not covered."""
        ticket = self._log.sync_begins(self._number)
        super().fdatasync()
        self._log.sync_ended(self._number, ticket)


class RecordingStorage(FileStorage):
    """Real files of one directory, recorded; what is there already counts as durable."""

    def __init__(self, directory: Path, log: Path) -> None:
        self._directory = directory
        self._log = Log(log)
        self._numbers = itertools.count(1)
        self._names: dict[str, int] = {}
        for path in sorted(directory.iterdir()):
            self._made(path, path.stat().st_size, path.read_bytes().rstrip(b"\0"))
        self._log.sync_ended(DIRECTORY, self._log.sync_begins(DIRECTORY))

    def _made(self, path: Path, size_bytes: int, content: bytes) -> None:
        number = next(self._numbers)
        self._named(path, number)
        with self._log.lock:
            self._log.append(_SIZE, number, 0, size_bytes)
            if content:
                self._log.append(_WRITE, number, 0, len(content), content)
        self._log.sync_ended(number, self._log.sync_begins(number))

    def _named(self, path: Path, number: int) -> None:
        """Record that a name is that file's from now on; 0: nobody's."""
        assert path.parent == self._directory
        if number:
            self._names[path.name] = number
        else:
            self._names.pop(path.name, None)
        with self._log.lock:
            self._log.append(_NAME, DIRECTORY, number, 0, path.name.encode())

    def create_file(self, path: Path, size_bytes: int, head: bytes, *, reserve: bool) -> None:
        """Create and record."""
        super().create_file(path, size_bytes, head, reserve=reserve)
        self._made(path, size_bytes, head)

    def sync_directory(self, directory: Path) -> None:
        """Sync and record."""
        assert directory == self._directory
        ticket = self._log.sync_begins(DIRECTORY)
        super().sync_directory(directory)
        self._log.sync_ended(DIRECTORY, ticket)

    def open_file(self, path: Path, *, exclusive: bool) -> RecordedFile:
        """Open a file that is recorded."""
        opened = super().open_file(path, exclusive=exclusive)
        return RecordedFile(opened, self._log, self._names[path.name])

    def replace_small(self, path: Path, content: bytes) -> None:
        """Take the steps of `FileStorage.replace_small` one by one, for each is recorded."""
        incoming = path.with_name(path.name + ".new")
        self.remove(incoming)
        self.create_file(incoming, len(content), content, reserve=False)
        self.rename(incoming, path)
        self.sync_directory(path.parent)

    def link(self, source: Path, target: Path) -> None:
        """Link and record; live bitmaps are not recorded."""
        super().link(source, target)
        if source.parent == self._directory:
            self._named(target, self._names[source.name])

    def rename(self, source: Path, target: Path) -> None:
        """Rename and record both names."""
        super().rename(source, target)
        self._named(target, self._names[source.name])
        self._named(source, 0)

    def remove(self, path: Path) -> None:
        """Remove and record; live bitmaps are not recorded."""
        super().remove(path)
        if path.parent == self._directory:
            self._named(path, 0)


@dataclass(frozen=True, slots=True)
class _Step:
    kind: bytes
    file: int
    at: int
    size: int
    content_at: int
    content_bytes: int


class Recording:
    """A log that has been written, to be replayed up to any record."""

    def __init__(self, log: Path) -> None:
        self._log = os.open(log, os.O_RDONLY | os.O_CLOEXEC)
        self._steps: list[_Step] = []
        self.positions: list[int] = []
        """Where in the log each record ends: the positions at which the power can be cut."""
        self.changes: list[int] = []
        """Those of them at which a name changes, or a directory's sync ends: changes of layers."""
        self.syncs: list[int] = []
        """Those of them at which the sync of a file has just ended."""
        length, position = os.fstat(self._log).st_size, 0
        while position < length:
            kind, file, at, size, content_bytes = _RECORD.unpack(
                os.pread(self._log, _RECORD.size, position)
            )
            content_at = position + _RECORD.size
            position = content_at + content_bytes
            self._steps.append(_Step(kind, file, at, size, content_at, content_bytes))
            self.positions.append(position)
            if file == DIRECTORY:
                self.changes.append(position)
            elif kind == _END:
                self.syncs.append(position)

    def close(self) -> None:
        """Close the log."""
        os.close(self._log)

    def replay(self, directory: Path, position: int, random: Random, kept_part: float) -> None:
        """Make what a power cut at a position leaves; `kept_part` of what was not synced is kept."""
        steps = self._steps[: bisect_right(self.positions, position)]
        covered = _covered(steps)
        directory.mkdir()
        for number, names in self._names(steps, covered, random, kept_part).items():
            first, *others = (directory / name for name in names)
            self._write_file(first, number, steps, covered.get(number, 0), random, kept_part)
            for other in others:
                os.link(first, other)

    def _names(
        self, steps: list[_Step], covered: dict[int, int], random: Random, kept_part: float
    ) -> dict[int, list[str]]:
        """Return the names that each file has: a name may have any value since the last sync."""
        values: dict[str, list[int]] = {}
        for index, step in enumerate(steps):
            if step.kind == _NAME:
                name = os.pread(self._log, step.content_bytes, step.content_at).decode()
                if index < covered.get(DIRECTORY, 0):
                    values[name] = [step.at]
                else:
                    values.setdefault(name, [0]).append(step.at)
        found: dict[int, list[str]] = {}
        for name, choices in sorted(values.items()):
            later = choices[1:]
            number = random.choice(later) if later and random.random() < kept_part else choices[0]
            if number:
                found.setdefault(number, []).append(name)
        return found

    def _write_file(
        self, path: Path, number: int, steps: list[_Step], covered: int, random: Random,
        kept_part: float,
    ) -> None:  # fmt: skip
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            for index, step in enumerate(steps):
                if step.file != number:
                    continue
                if step.kind == _SIZE and (index < covered or random.random() < kept_part):
                    os.ftruncate(descriptor, step.size)
                if step.kind in (_WRITE, _ZERO):
                    for start, end in _kept(step, index < covered, random, kept_part):
                        os.pwrite(descriptor, self._bytes(step, start, end), step.at + start)
        finally:
            os.close(descriptor)

    def _bytes(self, step: _Step, start: int, end: int) -> bytes:
        if step.kind == _ZERO:
            return bytes(end - start)
        return os.pread(self._log, end - start, step.content_at + start)


def _covered(steps: list[_Step]) -> dict[int, int]:
    """Return, for each file, how many of the steps precede a sync of it that has ended."""
    begun: dict[int, int] = {}
    covered: dict[int, int] = {}
    for index, step in enumerate(steps):
        if step.kind == _BEGIN:
            begun[step.at] = index
        elif step.kind == _END:
            covered[step.file] = max(covered.get(step.file, 0), begun[step.at])
    return covered


def _kept(
    step: _Step, durable: bool, random: Random, kept_part: float
) -> Iterator[tuple[int, int]]:  # fmt: skip
    """Yield the ranges of a write that are on the medium: all, none, or any of its sectors."""
    if durable:
        yield 0, step.size
    elif random.random() < 0.5:
        if random.random() < kept_part:
            yield 0, step.size
    else:
        start = 0
        while start < step.size:
            end = min(step.size, (step.at + start) // SECTOR_BYTES * SECTOR_BYTES
                      + SECTOR_BYTES - step.at)  # fmt: skip
            if random.random() < kept_part:
                yield start, end
            start = end
