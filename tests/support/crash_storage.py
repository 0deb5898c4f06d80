"""A storage that forgets: what was not synced may be lost when the host dies.

File content is lost or kept sector by sector, changes of names one by one, in any combination. Every
call is numbered, so that a fault, a death, or a write of somebody else, can come at each.
"""

import errno
import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from random import Random

from stratocache.cache.errors import Conflict
from stratocache.fs.storage import Buffer

SECTOR_BYTES = 512


class ProcessDied(BaseException):
    """The process ended in the middle of a call."""


class CrashFile:
    """A file in memory: `current` is what reads see, `durable` what the medium has."""

    def __init__(self, content: bytes) -> None:
        self.current = bytearray(content)
        self.durable = bytearray(content)
        self.unsynced: list[tuple[int, bytes]] = []
        self.locked = False

    def put(self, offset: int, content: bytes) -> None:
        """Write; nothing of it is durable yet. The page cache writes back whole sectors."""
        self.current[offset : offset + len(content)] = content
        start = offset - offset % SECTOR_BYTES
        end = -(-(offset + len(content)) // SECTOR_BYTES) * SECTOR_BYTES
        self.unsynced.append((start, bytes(self.current[start:end])))

    def sync(self) -> None:
        """Make all durable."""
        self.durable = bytearray(self.current)
        self.unsynced.clear()

    def host_dies(self, random: Random, kept_part: float) -> None:
        """Keep about that part of the sectors that were not synced, any of them."""
        if len(self.durable) < len(self.current) and random.random() < kept_part:
            self.durable.extend(bytes(len(self.current) - len(self.durable)))
        for offset, content in self.unsynced:
            end = min(offset + len(content), len(self.durable))
            start = offset
            while start < end:
                stop = min(end, start - start % SECTOR_BYTES + SECTOR_BYTES)
                if random.random() < kept_part:
                    self.durable[start:stop] = content[start - offset : stop - offset]
                start = stop
        self.unsynced.clear()
        self.current = bytearray(self.durable)


class OpenCrashFile:
    """One opening of a file; implements `stratocache.fs.storage.BlockFile`."""

    def __init__(self, name: str, file: CrashFile, storage: "CrashStorage", *, lock: bool) -> None:
        self._name = name
        self._file = file
        self._storage = storage
        self._lock = lock
        self._closed = False

    def _called(self, call: str) -> None:
        assert not self._closed, f"{call} of {self._name} after close"
        self._storage.called(self._name, call)

    def size(self) -> int:
        """Return the length in bytes."""
        return len(self._file.current)

    def pread(self, size: int, offset: int) -> bytes:
        """Return what was written last."""
        self._called("pread")
        found = bytes(self._file.current[offset : offset + size])
        if len(found) < size:
            raise OSError(errno.EIO, "the file ends too early")
        return found

    def pread_cached(self, size: int, offset: int) -> bytes | None:
        """Return what was written last, or None when the storage is cold."""
        if self._storage.cold:
            return None
        self._called("pread_cached")
        return bytes(self._file.current[offset : offset + size])

    def pwrite(self, buffer: Buffer, offset: int) -> None:
        """Write. A call that fails or dies has written the sectors of the first half."""
        content = bytes(buffer)
        try:
            self._called("pwrite")
        except (ProcessDied, OSError):
            middle = offset + len(content) // 2
            middle -= middle % SECTOR_BYTES
            if middle > offset:
                self._file.put(offset, content[: middle - offset])
            raise
        assert offset + len(content) <= len(self._file.current)
        self._file.put(offset, content)

    def zero(self, offset: int, size: int) -> None:
        """Write zeros."""
        self._called("zero")
        self._file.put(offset, bytes(size))

    def extend(self, size_bytes: int, *, reserve: bool) -> None:
        """Make the file longer, then durable."""
        self._called("extend")
        self._file.current.extend(bytes(max(0, size_bytes - len(self._file.current))))
        self._sync("fsync")

    def cut(self, size_bytes: int) -> None:
        """Cut off, then make that durable."""
        if len(self._file.current) > size_bytes:
            self._called("cut")
            del self._file.current[size_bytes:]
            self._sync("fsync")

    def share(self, source: int, source_offset: int, size: int, offset: int) -> None:
        """Take the bytes of a file of the operating system."""
        self._called("share")
        self._file.put(offset, os.pread(source, size, source_offset))

    def data_after(self, offset: int) -> int | None:
        """Return where the next byte is that is not zero."""
        rest = self._file.current[offset:]
        behind = len(rest.lstrip(b"\0"))
        return offset + len(rest) - behind if behind else None

    def fdatasync(self) -> None:
        """Make all durable."""
        self._sync("fdatasync")

    def _sync(self, call: str) -> None:
        """Make all durable; after a failure the kernel forgets that it was not."""
        try:
            self._called(call)
        except OSError:
            self._file.unsynced.clear()
            raise
        self._file.sync()

    def close(self) -> None:
        """Close; nothing is synced."""
        assert not self._closed, f"{self._name} is closed twice"
        self._closed = True
        if self._lock:
            self._file.locked = False


class CrashStorage:
    """Implements `stratocache.fs.storage.Storage` in memory, with faults.

    `faults` maps (file name, call) to the errno that the next such call raises, or to `DIE`; `arm`
    does so for the call of a number from now.
    """

    DIE = -1

    def __init__(self) -> None:
        self.faults: dict[tuple[str, str], int] = {}
        self.calls: list[tuple[str, str]] = []
        self.cold = False
        self.boot = 1
        self._armed = -1
        self._action: Callable[[], None] | None = None
        self._names: dict[Path, CrashFile] = {}
        self._durable_names: dict[Path, CrashFile] = {}
        self._pending: dict[Path, list[tuple[Path, CrashFile | None]]] = defaultdict(list)
        self._live: dict[Path, bytearray] = {}

    # Faults.

    def arm(self, number: int, action: Callable[[], None]) -> None:
        """Do something right before the call of that number from now, 0 is the next."""
        self._armed, self._action = number, action

    def disarm(self) -> bool:
        """End `arm`; tell whether the call came."""
        came = self._action is None
        self._armed, self._action = -1, None
        return came

    def called(self, name: str, call: str) -> None:
        """Record a call, and raise the fault that waits for it."""
        self.calls.append((name, call))
        number = self.faults.pop((name, call), None)
        if number is not None:
            self.fail(number)
        if self._action is not None:
            if self._armed == 0:
                action, self._action = self._action, None
                action()
            self._armed -= 1

    def fail(self, number: int) -> None:
        """Raise the error of that number, or die."""
        if number == self.DIE:
            raise ProcessDied
        raise OSError(number, os.strerror(number))

    # Files and their names.

    def create_file(self, path: Path, size_bytes: int, head: bytes, *, reserve: bool) -> None:
        """Make a file, durable but for its name."""
        if path in self._names:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        self.called(path.name, "create")
        # one that is cut short: perhaps there is the name, and nothing is durable
        file = CrashFile(b"")
        file.current = bytearray(head.ljust(size_bytes, b"\0"))
        file.unsynced.append((0, bytes(file.current)))
        self._set(path, file)
        self.called(path.name, "fsync")
        file.sync()

    def _set(self, path: Path, file: CrashFile | None) -> None:
        if file is None:
            self._names.pop(path, None)
        else:
            self._names[path] = file
        self._pending[path.parent].append((path, file))

    def sync_directory(self, directory: Path) -> None:
        """Make the names durable."""
        self.called(directory.name, "sync")
        for path, file in self._pending.pop(directory, []):
            self._apply(path, file)

    def _apply(self, path: Path, file: CrashFile | None) -> None:
        if file is None:
            self._durable_names.pop(path, None)
        else:
            self._durable_names[path] = file

    def _find(self, path: Path) -> CrashFile:
        if path not in self._names:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return self._names[path]

    def open_file(self, path: Path, *, exclusive: bool) -> OpenCrashFile:
        """Open a file."""
        file = self._find(path)
        if exclusive:
            if file.locked:
                raise Conflict("disk-in-use", f"{path} is open.")
            file.locked = True
        return OpenCrashFile(path.name, file, self, lock=exclusive)

    def read_small(self, path: Path, size_max: int) -> bytes | None:
        """Return a file."""
        self.called(path.name, "read")
        file = self._names.get(path)
        return None if file is None else bytes(file.current[: size_max + 1])

    def replace_small(self, path: Path, content: bytes) -> None:
        """Write beside, sync, rename, sync the directory."""
        incoming = path.with_name(path.name + ".new")
        self.remove(incoming)
        self.create_file(incoming, len(content), content, reserve=False)
        self.rename(incoming, path)
        self.sync_directory(path.parent)

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name."""
        self.called(target.name, "link")
        if source in self._live:
            self._live[target] = self._live[source]
            return
        assert target not in self._names
        self._set(target, self._find(source))

    def rename(self, source: Path, target: Path) -> None:
        """Rename in one step."""
        self.called(target.name, "rename")
        file = self._find(source)
        self._set(target, file)
        self._set(source, None)

    def remove(self, path: Path) -> None:
        """Remove a name."""
        if path in self._names or path in self._live:
            self.called(path.name, "remove")
        self._live.pop(path, None)
        if path in self._names:
            self._set(path, None)

    def names(self, directory: Path) -> list[str]:
        """List a directory."""
        self.called(directory.name, "list")
        return [path.name for path in self._names if path.parent == directory]

    # Live files.

    def boot_id(self) -> bytes:
        """Return what names this boot."""
        return self.boot.to_bytes(16, "little")

    def map_live(self, path: Path) -> bytearray | None:
        """Return the live file."""
        return self._live.get(path)

    def create_live(self, path: Path, content: bytes) -> bytearray:
        """Make a live file."""
        self._live[path] = bytearray(content)
        return self._live[path]

    # Deaths.

    def process_dies(self) -> None:
        """Let go of what only a living process holds."""
        for file in self._names.values():
            file.locked = False

    def host_dies(self, random: Random, kept_part: float = 0.0, *, keep_live: bool = False) -> None:
        """Lose what was not synced but for some part of it.

        Live files are lost too; with `keep_live`, as on a RUN_DIR that is no tmpfs, they stay.
        """
        self.process_dies()
        self.boot += 1
        if not keep_live:
            self._live.clear()
        files = {id(file): file for file in self._names.values()}
        for changes in self._pending.values():
            files |= {id(file): file for _, file in changes if file is not None}
            for path, file in changes:
                if random.random() < kept_part:
                    self._apply(path, file)
        self._pending.clear()
        self._names = dict(self._durable_names)
        files |= {id(file): file for file in self._names.values()}
        for file in files.values():
            file.host_dies(random, kept_part)
