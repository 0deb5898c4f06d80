"""Histories of a cache against a model of what must be readable, refused and kept.

Fetches, pins, clones, launches, evictions, rot, origins and a catalogue that say one thing and then
another, and the death of the process at any step.
"""

import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import hypothesis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.cache.errors import NotVerified, OriginFailed, StratocacheError
from stratocache.fs import cache_check, disk_intents, image_intents, inventory, launch_intents
from stratocache.fs.eviction import request_eviction
from stratocache.fs.records import COMPLETE, READABLE, DiskRequest, LaunchRequest, Operation
from stratocache.fs.scrubbing import request_scrub
from support.crashing import Fuse, is_crash
from support.damage import DAMAGES, damage
from support.keep_daemon import ROOT, KeepDaemon, KeepHost, Verdict, real_bytes

IMAGES = 5
STEPS = 20
_COMMON = Random(99).randbytes(2 * CHUNK_BYTES)
_INDEXES = st.integers(0, IMAGES - 1)
_VERDICTS: tuple[Verdict, ...] = ("current", "unlisted", "taken-back", "unknown")
_REFUSED = "image-withdrawn"


def _contents() -> list[bytes]:
    contents = []
    for seed in range(IMAGES):
        own = Random(seed).randbytes((1 + seed % 3) * CHUNK_BYTES + 4096 * seed)
        contents.append((_COMMON if seed % 2 else b"") + bytes(CHUNK_BYTES) + own)
    return contents


@dataclass
class _Wish:
    """A clone or a launch that was asked for."""

    operation: str
    images: tuple[str, ...]
    refused: bool | None
    """Whether it must be refused; None = what the catalogue says has changed since."""


class KeepingMachine(RuleBasedStateMachine):
    """One host whose cache holds about two of its five images."""

    histories = 0
    images_max = IMAGES
    """With fewer, more happens to each."""

    def __init__(self) -> None:
        super().__init__()
        type(self).histories += 1
        self.root = Path(tempfile.mkdtemp(prefix="stratocache-keeping-"))
        self.fuse = Fuse()
        self.host = KeepHost(self.root, max_bytes=10 * CHUNK_BYTES, fuse=self.fuse, asking=True)
        self.shelf = self.host.shelf
        contents = _contents()[: self.images_max]
        self.images = [self.shelf.add(content) for content in contents]
        self.wishes: list[_Wish] = []
        self.absences: Counter[str] = Counter()
        """How many processes came to rest since an image is not listed."""
        self.instances = 0
        self.host.rest()

    # What people want.

    @rule(index=_INDEXES, pin=st.booleans(), at_once=st.booleans())
    def fetch(self, index: int, pin: bool, at_once: bool) -> None:
        """Somebody wants an image, and may wait for it."""
        image_intents.request_fetch(self.host.db, ROOT, self._image(index), pin=pin and index < 2)
        if at_once:
            self.live()

    @rule(index=_INDEXES, pinned=st.booleans())
    def set_pin(self, index: int, pinned: bool) -> None:
        """Somebody pins or unpins what is there."""
        if self._image(index) in self.host.states():
            image_intents.set_pin(self.host.db, ROOT, self._image(index), pinned and index < 2)

    @rule(index=_INDEXES, at_once=st.booleans())
    def clone(self, index: int, at_once: bool) -> None:
        """Somebody wants a disk of an image, and may wait for it."""
        request = DiskRequest(reference=self._image(index))
        self._wish(disk_intents.create_disk(self.host.db, ROOT, request), self._image(index))
        if at_once:
            self.live()

    @rule(boot=_INDEXES, other=_INDEXES)
    def launch(self, boot: int, other: int) -> None:
        """Somebody boots a VM that sees a second image read-only."""
        self.instances += 1
        wanted = self._image(boot), self._image(other)
        request = LaunchRequest(wanted[0], f"vm{self.instances}", readonly=wanted[1:])
        self._wish(launch_intents.request_launch(self.host.db, ROOT, request), *wanted)

    @rule()
    def halt(self) -> None:
        """All VMs end."""
        for launch in inventory.launches(self.host.db):
            if launch.state == "active":
                launch_intents.halt(self.host.db, ROOT, launch.instance)

    @rule()
    def delete_disks(self) -> None:
        """Somebody has no use for his disks any more."""
        for disk in inventory.disks(self.host.db, ROOT, state="available"):
            if not inventory.attachments(self.host.db, disk_uuid=disk.uuid):
                disk_intents.delete_disk(self.host.db, ROOT, disk.uuid)

    @rule(index=_INDEXES, by_size=st.booleans())
    def evict(self, index: int, by_size: bool) -> None:
        """Somebody wants room."""
        try:
            if by_size:
                request_eviction(self.host.db, ROOT, size_bytes=(1 + index) * CHUNK_BYTES)
            else:
                request_eviction(self.host.db, ROOT, image_id=self._image(index))
        except StratocacheError:
            return  # it is held, or not there

    @rule()
    def scrub(self) -> None:
        """Somebody wants everything to be read again."""
        request_scrub(self.host.db, ROOT, "now")

    # What the world does.

    @rule(kind=st.sampled_from(sorted(DAMAGES)), seed=st.integers(0, 2**16))
    def rot(self, kind: str, seed: int) -> None:
        """A file of the cache is not what it was."""
        damage(self.host.configuration.state_dir, kind, Random(seed))

    @rule(index=_INDEXES, there=st.booleans())
    def origin(self, index: int, there: bool) -> None:
        """An origin goes, or comes back."""
        if there:
            self.shelf.bring_back(self._image(index))
        else:
            self.shelf.take_away(self._image(index))

    @rule(index=_INDEXES, verdict=st.sampled_from(_VERDICTS), at_once=st.booleans())
    def say(self, index: int, verdict: Verdict, at_once: bool) -> None:
        """The catalogue takes an image back, loses it, answers nonsense, or lists it again; mostly
        one that is here."""
        here = list(self.host.states()) or self.images
        identifier = here[index % len(here)]
        self.shelf.say(identifier, verdict)
        del self.absences[identifier]
        self._forget_wishes(identifier)
        if at_once:
            self.live()

    @rule(reachable=st.booleans())
    def reach(self, reachable: bool) -> None:
        """The catalogue cannot be reached, or can again."""
        self.shelf.reachable = reachable
        self._forget_wishes(*self.images)

    @rule(steps=st.integers(0, 40))
    def crash(self, steps: int) -> None:
        """A process dies after some steps."""
        held = self._held()
        self.fuse.left = steps
        try:
            self.host.rest()
        except BaseException as error:
            if not is_crash(error):
                raise
        finally:
            self.fuse.left = None
        self._check_held(held)

    @rule()
    def live(self) -> None:
        """A process brings everything to rest; then the model has its say."""
        held, before = self._held(), self.host.states()
        self.host.run(self._look)
        self._check_held(held)
        self._check_wishes()
        self._check_states(before)

    # The model.

    def _image(self, index: int) -> str:
        return self.images[index % len(self.images)]

    def _wish(self, operation: Operation, *images: str) -> None:
        states = self.host.states()
        current = [self.shelf.verdicts.get(name, "current") == "current" for name in images]
        withdrawn = [states.get(name) == "withdrawn" for name in images]
        refused: bool | None = None
        if any(gone and not good for gone, good in zip(withdrawn, current, strict=True)):
            refused = True
        elif all(current) and not any(withdrawn):
            refused = False
        self.wishes.append(_Wish(operation.id, images, refused))

    def _forget_wishes(self, *images: str) -> None:
        for wish in self.wishes:
            if set(wish.images) & set(images) and not self._ended(wish).finished:
                wish.refused = None

    def _ended(self, wish: _Wish) -> Operation:
        return inventory.operation(self.host.db, wish.operation)

    def _check_wishes(self) -> None:
        """Of withdrawn images nothing was made, and no other was refused as withdrawn."""
        for wish in self.wishes:
            ended = self._ended(wish)
            assert ended.finished
            if wish.refused is True:
                assert ended.state == "failed", f"{ended.kind} of a withdrawn image"
            elif wish.refused is False:
                assert (ended.error or {}).get("code") != _REFUSED
        self.wishes.clear()

    def _held(self) -> set[str]:
        """Return images that must stay: pinned, attached, or read by a disk that stays."""
        rows = self.host.db.rows(
            "SELECT id FROM images WHERE pinned AND state IN ('verified', 'withdrawn') "
            "UNION SELECT base_manifest FROM disks WHERE state = 'available' AND form = 'overlay' "
            "AND NOT EXISTS (SELECT 1 FROM attachments WHERE disk_uuid = uuid AND state = 'removing') "
            "UNION SELECT image_id FROM attachments WHERE image_id IS NOT NULL AND state = 'ready'"
        )
        return {row["id"] for row in rows}

    def _check_held(self, held: Iterable[str]) -> None:
        states = self.host.states()
        assert {name for name in held if states.get(name) not in READABLE} == set()

    def _check_states(self, before: dict[str, str]) -> None:
        """What is complete is withdrawn if and only if its catalogue means it."""
        for name, state in self.host.states().items():
            assert state in COMPLETE
            verdict = self.shelf.verdicts.get(name, "current")
            silent = not self.shelf.reachable or verdict == "unknown"
            if verdict == "unlisted" and self.shelf.reachable:
                self.absences[name] += 1
            if silent or (verdict == "unlisted" and self.shelf.asks[name] <= 1):
                assert before.get(name, state) in (state, "fetching", "deleting")
            elif verdict == "unlisted":
                assert state == "withdrawn" or self.absences[name] < 2
            else:
                assert state == ("verified" if verdict == "current" else "withdrawn")

    async def _look(self, daemon: KeepDaemon) -> None:
        """Come to rest and read everything that there is."""
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
        """With all origins back everything is whole again, listed, and every byte has a reason."""
        try:
            if sys.exc_info()[0] is None:
                self._check_end()
        finally:
            self.host.close()
            shutil.rmtree(self.root)

    def _check_end(self) -> None:
        self.shelf.reachable = True
        for identifier in self.images:
            self.shelf.bring_back(identifier)
            self.shelf.say(identifier, "current")
        request_scrub(self.host.db, ROOT, "now")
        self.host.run(self._look)
        assert set(self.host.states().values()) <= {"verified"}
        state_dir = self.host.configuration.state_dir
        report = cache_check.check(self.host.configuration, deep=True)
        assert report.faults == []
        assert {finding.code for finding in report.leaks} <= {"quarantined"}
        assert sum(report.bytes.values()) == real_bytes(state_dir, cache_check.ROOMS)
        assert cache_check.check(self.host.configuration, repair=True).leaks == []
        assert not self.host.db.rows("SELECT 1 FROM losses")


def run_histories(machine: type[KeepingMachine], count: int, seed: int, **changes: Any) -> None:
    """Run that many histories; the steps of one that fails are printed."""
    hypothesis.seed(seed)(machine)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=count, stateful_step_count=STEPS, deadline=None, database=None,
            print_blob=True, report_multiple_bugs=False, suppress_health_check=list(HealthCheck),
            phases=[hypothesis.Phase.generate],  # shrinking takes longer than reading
            **changes,
        ),
    )  # fmt: skip


def play(history: Iterable[tuple[str, dict[str, Any]]]) -> None:
    """Run one history: names of rules with what they are given; raises what the model finds."""
    machine = KeepingMachine()
    try:
        for name, arguments in history:
            getattr(machine, name)(**arguments)
    finally:
        machine.teardown()
