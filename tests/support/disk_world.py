"""One disk on a storage that fails and forgets, beside a model of what it must have.

The model is `content`, what reads must see, and per sector what a power cut may leave: the flushed
content or any version acknowledged, or under way, since. Every step checks; an `AssertionError` is a
disk that lied.
"""

import errno
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Literal

import trio

from stratocache.cache.errors import Conflict
from stratocache.fs import transitions
from stratocache.fs.base import BlockSource
from stratocache.fs.bitmap import BLOCK_BYTES
from stratocache.fs.layers import RAW, DiskFiles
from stratocache.fs.overlay import Overlay
from support.crash_storage import SECTOR_BYTES, CrashStorage, ProcessDied
from support.overlays import ChunkedImageFile

Interruption = Literal["none", "process", "host", "error", "full", "write"]
Outcome = Literal["done", "failed", "died"]
_ERRNO = {"error": errno.EIO, "full": errno.ENOSPC}


@dataclass(frozen=True)
class Plan:
    """What happens right before one storage call of an operation."""

    what: Interruption = "none"
    call: int = 0
    """Its number, 0 is the operation's first."""
    kept_part: float = 0.0
    """After a power cut: the part of the changes that were not synced which the medium has."""
    keep_live: bool = False
    """After a power cut: whether the live bitmaps are still there, of the boot before."""


NOTHING = Plan()


class DiskWorld:
    """One disk, its model, and the manifests and snapshots around it."""

    def __init__(
        self, storage: CrashStorage, size_bytes: int, base: bytes | None, seed: int
    ) -> None:
        self.random = Random(seed)
        self.storage = storage
        self.files = DiskFiles(Path("/state/disks/disk"), Path("/run/live/disk"), storage)
        self.manifests: dict[str, ChunkedImageFile] = {}
        self.snapshots: list[str] = []
        self.content = bytearray(size_bytes)
        self.overlay: Overlay | None = None
        self.pending: list[bytes] | None = None
        """What the frozen layer may hold; None when nothing is frozen or nothing is known of it."""
        self.pending_weak = False
        """Whether that is not durable: the freeze failed at its end, and said so."""
        self.pending_unknown = False
        """Whether it was lost since."""
        self.sizes: set[int] = set()
        """Lengths that the disk may have after a death, besides its own."""
        self.faulted = False
        """Whether an error of this boot excuses the errors of later calls."""
        self.interrupted = 0
        self.clones = 0
        self._local_bytes = 0
        self.versions: dict[int, set[bytes]] = defaultdict(set)
        self._during: dict[int, set[bytes]] = defaultdict(set)
        """Those of the operation that is under way."""
        if base is None:
            storage.create_file(self.files.data(RAW), size_bytes, b"", reserve=False)
            storage.sync_directory(self.files.directory)
        else:
            self.content[: len(base)] = base
            self.manifests["image"] = ChunkedImageFile(base)
            transitions.create(self.files, size_bytes, "image")
        self._flushed(bytes(self.content))
        self._open()

    # The model.

    def _flushed(self, content: bytes) -> None:
        """Note that this content is durable; what was written meanwhile may be."""
        self.durable = content
        self.versions = self._during
        self._during = defaultdict(set)

    def _note(self, offset: int, written: bytes) -> None:
        """Note that the sectors of a range may be found with these bytes."""
        changed = bytearray(self.content)
        changed[offset : offset + len(written)] = written
        for start in range(offset - offset % SECTOR_BYTES, offset + len(written), SECTOR_BYTES):
            sector = bytes(changed[start : start + SECTOR_BYTES])
            self.versions[start].add(sector)
            self._during[start].add(sector)

    def _adopt_each_sector(self, found: bytes, other: bytes | bytearray) -> None:
        """Take what was found after a write that ended in its middle: each sector old or new."""
        self._adopt_length(found)
        other = other.ljust(len(found), b"\0")
        for start in range(0, len(found), SECTOR_BYTES):
            sector = slice(start, start + SECTOR_BYTES)
            assert found[sector] in (self.content[sector], other[sector]), f"sector at {start}"
        self.content = bytearray(found)

    def _adopt_length(self, found: bytes) -> None:
        """Take the length after a death in the middle of growth."""
        if len(found) != len(self.content):
            assert len(found) in self.sizes, "a length that nobody asked for"
            self.content.extend(bytes(len(found) - len(self.content)))

    def _adopt_after_power_cut(self, found: bytes) -> None:
        """Take what was found after a power cut."""
        size = len(found)
        assert size in self.sizes | {len(self.content)}, "a length that nobody asked for"
        durable = self.durable.ljust(size, b"\0")
        assert len(self.durable) <= size, "the disk shrank"
        for start in range(0, size, SECTOR_BYTES):
            sector = slice(start, start + SECTOR_BYTES)
            if found[sector] != durable[sector]:
                versions = {old.ljust(SECTOR_BYTES, b"\0") for old in self.versions[start]}
                there = found[sector].ljust(SECTOR_BYTES, b"\0")
                assert there in versions, f"the sector at {start} is one that nobody wrote"
        self.content = bytearray(found)

    # Deaths.

    @property
    def form(self) -> str:
        """The form that the files say."""
        return "raw" if self.files.layout() is None else "overlay"

    def _is_frozen(self) -> bool:
        layout = self.files.layout()
        return layout is not None and layout.frozen is not None

    def _base_reader(self, name: str) -> BlockSource:
        return self.manifests[name]

    def _open(self) -> None:
        self.overlay = None
        if self.form == "overlay":
            self.overlay = Overlay(self.files, self._base_reader)
            if self.overlay.frozen is None:
                self.pending, self.pending_weak, self.pending_unknown = None, False, False

    def read_all(self) -> bytes:
        """Return the whole disk."""
        self.storage.cold = False
        if self.overlay is not None:
            return bytes(trio.run(self.overlay.read, 0, self.overlay.size_bytes))
        data = self.storage.open_file(self.files.data(RAW), exclusive=False)
        found = data.pread(data.size(), 0)
        data.close()
        return found

    def _close(self) -> None:
        if self.overlay is not None:
            self.overlay.close()
            self.overlay = None

    def _close_for_change(self) -> None:
        """Close the disk, after another process has settled what the last error left open."""
        self._close()
        self._open()
        self._check_same()
        if self.overlay is not None:
            self._local_bytes = self.overlay.local_bytes
        self._close()

    def die(self, plan: Plan) -> None:
        """Let the process, or the host, die, and another open the disk; `content` is judged later."""
        self.storage.faults.clear()
        if self.overlay is not None:
            # what it holds goes with it; its calls may not come back to haunt the files
            self.overlay = None
        if plan.what == "host":
            self.storage.host_dies(self.random, plan.kept_part, keep_live=plan.keep_live)
            self.faulted = False
        else:
            self.storage.process_dies()
        self._open()

    def process_dies(self) -> None:
        """Everything acknowledged is there."""
        self.die(Plan("process"))
        self._check_same()

    def host_dies(self, plan: Plan) -> None:
        """Everything flushed is there, and no sector is one that nobody wrote."""
        self.die(plan)
        self._settle_power_cut()

    def _settle_power_cut(self) -> None:
        self._adopt_after_power_cut(self.read_all())
        if self.pending_weak:
            self.pending, self.pending_unknown = None, True
        self._settle_structure()
        self._during.clear()
        self._flushed(bytes(self.content))
        self.check_frozen()
        self.flush(NOTHING)

    def _settle_structure(self) -> None:
        self.sizes.clear()
        frozen = self.overlay.frozen if self.overlay is not None else None
        if frozen is not None and self.pending is None and not self.pending_unknown:
            # a freeze that was not told to have ended: the top is empty, so it holds all there is
            self.pending = [bytes(self.content[: frozen.size_bytes])]

    def _check_same(self) -> None:
        found = self.read_all()
        self._adopt_length(found)
        assert found == self.content, "something acknowledged is lost"
        self._settle_structure()
        self.check_frozen()

    # Operations, each with what may come in between.

    def attempt(
        self,
        operation: Callable[[], object],
        plan: Plan,
    ) -> Outcome:
        """Run an operation with an interruption; errors are excused by a fault only."""
        self._during.clear()
        if plan.what != "none":
            self.storage.arm(plan.call, partial(self._interrupt, plan))
        try:
            operation()
        except ProcessDied:
            return "died"
        except OSError as error:
            assert self.faulted, f"an error without a cause: {error!r}"
            return "failed"
        finally:
            if self.storage.disarm():
                self.interrupted += 1
        return "done"

    def _interrupt(self, plan: Plan) -> None:
        if plan.what in _ERRNO:
            self.faulted = True
            self.storage.fail(_ERRNO[plan.what])
        elif plan.what == "write":
            # beside an operation that is in a thread, the loop takes a write
            if threading.current_thread() is not threading.main_thread():
                trio.from_thread.run_sync(self._write_beside)
        else:
            self.storage.fail(self.storage.DIE)

    def _write_beside(self) -> None:
        if self.overlay is None:
            return
        size = min(self.random.choice([100, 512, BLOCK_BYTES, 9000]), len(self.content))
        offset = self.random.randrange(len(self.content) - size + 1)
        written = self.random.randbytes(size)
        self._note(offset, written)
        # one that had to wait would be no write beside
        cold, self.storage.cold = self.storage.cold, False
        assert self.overlay.write_nowait(offset, written)
        self.storage.cold = cold
        self.content[offset : offset + size] = written

    def _after(self, outcome: str, plan: Plan) -> None:
        """Recover from an operation that changes no byte."""
        if outcome == "died":
            self.die(plan)
            if plan.what == "host":
                self._settle_power_cut()
            else:
                self._check_same()

    def write(self, offset: int, written: bytes, plan: Plan, *, cold: bool) -> None:
        """Write, on a raw disk as tgt does."""
        self._note(offset, written)
        for manifest in self.manifests.values():
            manifest.cold = cold
        changed = bytearray(self.content)
        changed[offset : offset + len(written)] = written
        if self.overlay is None:
            data = self.storage.open_file(self.files.data(RAW), exclusive=False)
            data.pwrite(written, offset)
            data.close()
            self.content = changed
            return
        outcome = self.attempt(partial(trio.run, self.overlay.write, offset, written), plan)
        for manifest in self.manifests.values():
            manifest.cold = False
        if outcome == "died":
            self.die(plan)
            if plan.what == "host":
                self._settle_power_cut()
                return
        if outcome == "done":
            self.content[offset : offset + len(written)] = written
        else:
            self._adopt_each_sector(self.read_all(), changed)

    def read(self, offset: int, size: int, plan: Plan, *, cold: bool) -> None:
        """Read anywhere, past the end too."""
        self.storage.cold = cold
        found: list[bytes] = []

        async def read() -> None:
            assert self.overlay is not None
            found.append(bytes(await self.overlay.read(offset, size)))

        if self.overlay is not None:
            before = self.content[offset : offset + size]
            outcome = self.attempt(partial(trio.run, read), plan)
            self.storage.cold = False
            if outcome == "done":
                # beside a write each sector is as before or as after it
                after = self.content[offset : offset + size]
                assert found[0] in (before, after) or plan.what == "write", "read"
            self._after(outcome, plan)

    def flush(self, plan: Plan) -> None:
        """Flush; a disk that lost data refuses until the host boots."""
        before = bytes(self.content)
        if self.overlay is None:
            data = self.storage.open_file(self.files.data(RAW), exclusive=False)
            data.fdatasync()
            data.close()
            self._flushed(before)
            return
        outcome = self.attempt(partial(trio.run, self.overlay.flush), plan)
        if outcome == "done":
            self._flushed(before)
        self._after(outcome, plan)

    def freeze(self, plan: Plan) -> None:
        """Begin a snapshot, on a raw disk with a transition."""
        before = bytes(self.content)
        if self.overlay is None:
            outcome = self.attempt(partial(transitions.freeze_raw, self.files), plan)
            if outcome == "failed":
                # what the kernel lost of a raw file it told its user; the contract ends there
                self.host_dies(Plan("host"))
                return
            if outcome == "done":
                self._flushed(before)
                self._open()
                self.pending = [before]
            self._after(outcome, plan)
            return
        was_frozen = self.overlay.frozen is not None
        outcome = self.attempt(partial(trio.run, self.overlay.freeze), plan)
        if outcome == "done":
            self._flushed(before)
            if not was_frozen:
                self.pending = [before, bytes(self.content)]
        self._after(outcome, plan)
        if outcome == "done":
            self.pending_weak = False
        if outcome == "failed" and not was_frozen and self.overlay.frozen is not None:
            self.pending, self.pending_weak = [before, bytes(self.content)], True
        self.check_frozen()

    def frozen_content(self) -> bytes | None:
        """Return what a snapshot of the frozen layer has; None when it was lost, as was reported."""
        assert self.overlay is not None
        frozen = self.overlay.frozen
        assert frozen is not None
        layout = self.files.layout()
        assert layout is not None
        size = frozen.size_bytes
        content = bytearray(size)
        if layout.base is not None:
            base = self.manifests[layout.base].content
            content[: len(base)] = base
        try:
            for index in frozen.chunks():
                chunk = frozen.read_chunk(index)
                start = index * ChunkedImageFile.CHUNK_BYTES
                content[start : start + len(chunk)] = chunk
        except OSError:
            assert self.faulted
            return None
        assert len(content) == size
        return bytes(content)

    def check_frozen(self) -> None:
        """Compare the frozen layer with the moment it was frozen at."""
        if self.overlay is not None and self.overlay.frozen is not None and self.pending:
            found = self.frozen_content()
            assert found is None or found in self.pending, "a snapshot changed"

    def absorb(self, plan: Plan) -> None:
        """End a snapshot: publish what is frozen as a manifest, and rebase onto it."""
        if self.overlay is None or self.overlay.frozen is None:
            return
        content = self.frozen_content()
        if content is None:
            return
        assert self.pending is None or content in self.pending, "a snapshot is wrong"
        name = f"snapshot-{len(self.manifests)}"
        self.manifests[name] = ChunkedImageFile(content)
        self.snapshots.append(name)
        rebase = partial(trio.run, self.overlay.rebase, self.manifests[name], name)
        outcome = self.attempt(rebase, plan)
        if outcome == "done":
            self.pending, self.pending_weak, self.pending_unknown = None, False, False
        self._after(outcome, plan)

    def rollback(self, name: str, plan: Plan) -> None:
        """Go back to a snapshot; what is frozen and no snapshot yet forbids it."""
        wanted = self.manifests[name].content
        pending = self._is_frozen()
        self._close_for_change()
        old = bytes(self.content)
        operation = partial(transitions.rollback, self.files, len(wanted), name)
        try:
            outcome = self.attempt(operation, plan)
        except Conflict as error:
            assert pending
            assert error.code == "snapshot-pending"
            self._open()
            return
        assert outcome != "done" or not pending
        if outcome == "died":
            self.storage.faults.clear()
            self.die(plan)
        else:
            self.storage.process_dies()
            self._open()
        found = self.read_all()
        if outcome == "done" or (found == wanted and found != old):
            assert found == wanted, "not what the snapshot had"
            self.content = bytearray(wanted)
            self._during.clear()
            self._flushed(wanted)
        elif outcome == "died" and plan.what == "host":
            self._adopt_after_power_cut(found)
            self._flushed(found)
        else:
            assert found == old, "neither before nor after"
        self._settle_structure()

    def clone(self, name: str) -> None:
        """Make a disk over a snapshot, write it, and let it be: nobody else's bytes change."""
        manifest = self.manifests[name]
        self.clones += 1
        directory = Path(f"/state/disks/clone-{self.clones}")
        files = DiskFiles(directory, Path("/run/live") / directory.name, self.storage)
        transitions.create(files, manifest.size_bytes + BLOCK_BYTES, name)
        clone = Overlay(files, self._base_reader)
        size = clone.size_bytes
        assert trio.run(clone.read, 0, size) == manifest.content.ljust(size, b"\0")
        clone.write_nowait(0, self.random.randbytes(min(5000, size)))
        trio.run(clone.aclose)
        assert self.read_all() == self.content

    def grow(self, size_bytes: int, plan: Plan) -> None:
        """Make the disk larger."""
        if self.overlay is None:
            data = self.storage.open_file(self.files.data(RAW), exclusive=False)
            data.extend(size_bytes, reserve=False)
            data.close()
            self.content.extend(bytes(size_bytes - len(self.content)))
            self._flushed(bytes(self.content))
            return
        self.sizes.add(size_bytes)
        outcome = self.attempt(partial(trio.run, self.overlay.grow, size_bytes), plan)
        if outcome == "done":
            added = size_bytes - len(self.content)
            self.content.extend(bytes(added))
            self.durable += bytes(added)
            assert self.overlay.size_bytes == size_bytes
        self._after(outcome, plan)

    def fill(self, plan: Plan, *, reflink: bool) -> None:
        """Bring all into the top layer."""
        if self.overlay is None:
            return
        before = bytes(self.content)
        fill = partial(trio.run, partial(self.overlay.fill, lambda done: None, reflink=reflink))
        outcome = self.attempt(fill, plan)
        if outcome == "done":
            assert self.overlay.local_bytes == self.overlay.size_bytes
            self._flushed(before)
        self._after(outcome, plan)
        assert self.read_all() == self.content, "promotion changed a byte"

    def finish_promotion(self, plan: Plan) -> None:
        """Make the disk raw, if it is full and nothing is frozen."""
        if self.overlay is None:
            return
        self._close_for_change()
        layout = self.files.layout()
        assert layout is not None
        ready = self._local_bytes == layout.size_bytes and layout.frozen is None
        operation = partial(transitions.finish_promotion, self.files)
        try:
            outcome = self.attempt(operation, plan)
        except Conflict as error:
            assert not ready
            assert error.code in ("promotion-incomplete", "snapshot-pending")
            self._open()
            return
        assert ready or outcome != "done"
        if outcome == "died":
            self.die(plan)
            if plan.what == "host":
                self._settle_power_cut()
                return
        else:
            self.storage.process_dies()
            self._open()
        if outcome == "done":
            assert self.form == "raw"
            self._flushed(bytes(self.content))
        self._check_same()

    def close(self) -> None:
        """Compare once more, and close everything."""
        self._check_same()
        self._close()
        for manifest in self.manifests.values():
            manifest.close()
