"""The cache against a model: fetches, pins, clones, evictions, rot, lost origins and crashes.

What must be readable is, byte for byte; what cannot be repaired is an error, never other bytes; in
the end every byte in the cache's rooms is accounted for. `make crash` runs KEEP_EXAMPLES histories.
"""

import os
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule
from support.crashing import Fuse, is_crash
from support.damage import DAMAGES, damage
from support.keep_daemon import ROOT, KeepDaemon, KeepHost, real_bytes

from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.cache.errors import NotVerified, OriginFailed, StratocacheError
from stratocache.fs import cache_check, disk_intents, intents, inventory
from stratocache.fs.eviction import request_eviction
from stratocache.fs.records import DiskRequest
from stratocache.fs.scrubbing import request_scrub

EXAMPLES = int(os.environ.get("KEEP_EXAMPLES", "6"))
IMAGES = 5

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180 + 40 * EXAMPLES)]

_COMMON = Random(99).randbytes(2 * CHUNK_BYTES)
Script = Callable[[KeepDaemon], Awaitable[None]]


def _contents() -> list[bytes]:
    contents = []
    for seed in range(IMAGES):
        own = Random(seed).randbytes((1 + seed % 3) * CHUNK_BYTES + 4096 * seed)
        contents.append((_COMMON if seed % 2 else b"") + bytes(CHUNK_BYTES) + own)
    return contents


class KeepingMachine(RuleBasedStateMachine):
    """One host whose cache holds about two of its five images."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="stratocache-keeping-"))
        self.fuse = Fuse()
        self.host = KeepHost(self.root, max_bytes=10 * CHUNK_BYTES, fuse=self.fuse)
        self.shelf = self.host.shelf
        self.images = [self.shelf.add(content) for content in _contents()]
        self.host.rest()

    def _pinned(self) -> set[str]:
        """Return the images that are here for good; bases of disks are read as disks."""
        images = inventory.images(self.host.db)
        return {image.id for image in images if image.state == "verified" and image.pinned}

    @rule(index=st.integers(0, IMAGES - 1), pin=st.booleans())
    def fetch(self, index: int, pin: bool) -> None:
        """Somebody wants an image."""
        intents.request_fetch(self.host.db, ROOT, self.images[index], pin=pin and index < 2)

    @rule(index=st.integers(0, IMAGES - 1), pinned=st.booleans())
    def set_pin(self, index: int, pinned: bool) -> None:
        """Somebody pins or unpins what is there."""
        if self.images[index] in self.host.states():
            intents.set_pin(self.host.db, ROOT, self.images[index], pinned and index < 2)

    @rule(index=st.integers(0, IMAGES - 1))
    def clone(self, index: int) -> None:
        """Somebody wants a disk of an image."""
        request = DiskRequest(reference=self.images[index])
        disk_intents.create_disk(self.host.db, ROOT, request)

    @rule()
    def delete_disks(self) -> None:
        """Somebody has no use for his disks any more."""
        for disk in inventory.disks(self.host.db, ROOT, state="available"):
            disk_intents.delete_disk(self.host.db, ROOT, disk.uuid)

    @rule(index=st.integers(0, IMAGES - 1), by_size=st.booleans())
    def evict(self, index: int, by_size: bool) -> None:
        """Somebody wants room."""
        try:
            if by_size:
                request_eviction(self.host.db, ROOT, size_bytes=(1 + index) * CHUNK_BYTES)
            else:
                request_eviction(self.host.db, ROOT, image_id=self.images[index])
        except StratocacheError:
            return  # it is held, or not there

    @rule(kind=st.sampled_from(sorted(DAMAGES)), seed=st.integers(0, 2**16))
    def rot(self, kind: str, seed: int) -> None:
        """A file of the cache is not what it was."""
        damage(self.host.configuration.state_dir, kind, Random(seed))

    @rule(index=st.integers(0, IMAGES - 1), there=st.booleans())
    def origin(self, index: int, there: bool) -> None:
        """An origin goes, or comes back."""
        if there:
            self.shelf.bring_back(self.images[index])
        else:
            self.shelf.take_away(self.images[index])

    @rule()
    def scrub(self) -> None:
        """Somebody wants everything to be read again."""
        request_scrub(self.host.db, ROOT, "now")

    @rule(steps=st.integers(0, 40))
    def crash(self, steps: int) -> None:
        """A process dies after some steps."""
        before = self._pinned()
        self.fuse.left = steps
        try:
            self.host.rest()
        except BaseException as error:
            if not is_crash(error):
                raise
        finally:
            self.fuse.left = None
        assert before <= self._pinned()

    @rule()
    def live(self) -> None:
        """A process brings everything to rest, and what can be read is right."""
        self.host.run(self._look)

    async def _look(self, daemon: KeepDaemon) -> None:
        await daemon.rest()
        for identifier in self.host.states():
            await self._read(identifier, partial(daemon.read_image, identifier))
        for disk in inventory.disks(self.host.db, ROOT, state="available"):
            assert disk.base_image is not None
            if disk.form == "overlay":
                await self._read(disk.base_image, partial(daemon.read_disk, disk.number))

    async def _read(self, identifier: str, read: Callable[[], Awaitable[bytes]]) -> None:
        try:
            assert await read() == self.shelf.contents[identifier]
        except (NotVerified, OriginFailed):
            gone = [name for name in self.images if not self.shelf.path(name).exists()]
            assert gone, "everything can be had again, so nothing is lost"

    def teardown(self) -> None:
        """With all origins back everything is whole again and every byte has a reason."""
        try:
            for identifier in self.images:
                self.shelf.bring_back(identifier)
            request_scrub(self.host.db, ROOT, "now")
            self.host.run(self._look)
            state_dir = self.host.configuration.state_dir
            report = cache_check.check(self.host.configuration, deep=True)
            assert report.faults == []
            assert {finding.code for finding in report.leaks} <= {"quarantined"}
            assert sum(report.bytes.values()) == real_bytes(state_dir, cache_check.ROOMS)
            assert cache_check.check(self.host.configuration, repair=True).leaks == []
            assert not self.host.db.rows("SELECT 1 FROM losses")
        finally:
            self.host.close()
            shutil.rmtree(self.root)


KeepingMachine.TestCase.settings = settings(
    max_examples=EXAMPLES, stateful_step_count=20, deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # shrinking takes longer than reading
)  # fmt: skip


class TestKeeping(KeepingMachine.TestCase):  # type: ignore[misc,valid-type]
    """Nothing that is held goes, nothing wrong is read, nothing is left over."""
