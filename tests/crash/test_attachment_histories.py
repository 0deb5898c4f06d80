"""Random histories of attachments: never two writers, but for the bounded pair of a migration, and
never a session of what has been cut off.

The real intents, database, leases and reconciler; targets in memory with sessions, and in a few
histories a real tgtd with libiscsi's initiators. `make test` plays some, `make crash` what
ATTACHMENT_HISTORIES and TGT_HISTORIES say.
"""

import os
import shutil
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support.attachment_world import Key, MemoryWorld, TgtWorld
from support.crashing import CrashingDatabase, Fuse, fresh_configuration, is_crash
from trio.testing import MockClock

from stratocache.cache.chunks import ChunkStore
from stratocache.cache.errors import Conflict, NotFound
from stratocache.cache.images import ImageStore
from stratocache.fs import attachment_intents, disk_intents, inventory, leases, migrations
from stratocache.fs.blocks import Blocks
from stratocache.fs.disk_work import DiskWork
from stratocache.fs.disks import DiskStore
from stratocache.fs.reconciler import Reconciler
from stratocache.fs.records import Attachment, Caller, DiskRequest
from stratocache.fs.target import iqn_of

HISTORIES = int(os.environ.get("ATTACHMENT_HISTORIES", "40"))
TGT_HISTORIES = int(os.environ.get("TGT_HISTORIES", "6"))
ROOT = Caller("root", "admin")
DISKS = 2
PASSES_MAX = 20
# a pass takes some five of them for each attachment that changes
STEPS = st.none() | st.integers(0, 10) | st.integers(0, 40)
_T = TypeVar("_T")


class Histories(RuleBasedStateMachine):
    """Launchers, initiators, a clock, a process that dies, a target daemon that dies."""

    real_time = False

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="stratocache-attachments-"))
        self.configuration = fresh_configuration(self.root)
        self.fuse = Fuse()
        self.db = CrashingDatabase(self.configuration.database, self.fuse)
        self.db.migrate()
        self.chunks = ChunkStore(self.configuration.state_dir / "chunks")
        self.process: Reconciler | None = None
        self.ahead_s = 0.0
        """How much later than it is the process believes it to be."""
        self.keys: list[Key] = []
        self.world = self.make_world()

    def make_world(self) -> Any:
        """Return the target daemon."""
        world = MemoryWorld(self.fuse)
        world.watch = self.no_disk_is_split
        return world

    @property
    def targets(self) -> Any:
        """What the reconciler drives."""
        return self.world

    def _now(self) -> datetime:
        return datetime.now(UTC) + timedelta(seconds=self.ahead_s)

    def _attachments(self) -> list[Attachment]:
        return inventory.attachments(self.db)

    def _note(self, attachment_id: str, name: str) -> None:
        """Keep what a launcher is told."""
        item = inventory.attachment(self.db, attachment_id)
        secret = self.db.secrets.open(item.id, item.sealed_secret)
        key = Key(
            item.id, item.epoch, iqn_of(item.id), secret, name, item.access == "ro"
        )  # fmt: skip
        if key not in self.keys:
            self.keys.append(key)

    @initialize()
    def begin(self) -> None:
        """There are disks."""
        for _ in range(DISKS):
            disk_intents.create_disk(self.db, ROOT, DiskRequest(size_bytes=2**20))
        self.rest()

    @rule(
        disk=st.integers(0, DISKS - 1), vm=st.integers(0, 3), bound=st.booleans(),
        access=st.sampled_from(["rw", "rw", "ro"]), leased=st.booleans(),
    )  # fmt: skip
    def attach(self, disk: int, vm: int, bound: bool, access: Any, leased: bool) -> None:
        """Somebody attaches a disk, as far as that is allowed."""
        uuid = self.db.rows("SELECT uuid FROM disks ORDER BY number")[disk]["uuid"]
        name = f"iqn.2026-11.org.example:vm{vm}"
        try:
            operation = attachment_intents.attach(
                self.db, ROOT, uuid, instance=f"vm{vm}", access=access,
                initiator=name if bound else None, lease_s=100 if leased else None,
            )  # fmt: skip
        except Conflict:
            return
        self._note(operation.subject, name)

    @rule(disk=st.integers(0, DISKS - 1), vm=st.integers(0, 3), leased=st.booleans(), steps=STEPS)
    def boot(self, disk: int, vm: int, leased: bool, steps: int | None) -> None:
        """Somebody attaches a disk, and its guest works on it as soon as it can."""
        self.attach(disk, vm, False, "rw", leased)
        self._live(steps)
        if self.keys:
            self.world.log_in(self.keys[-1])

    @rule(index=st.integers(0, 9), vm=st.integers(0, 3), steps=STEPS)
    def move(self, index: int, vm: int, steps: int | None) -> None:
        """Somebody begins a migration, and the new guest works as soon as it can."""
        if self.keys:
            self.migrate(index, vm)
            self._live(steps)
            self.world.log_in(self.keys[-1])

    @rule(index=st.integers(0, 9), force=st.booleans())
    def detach(self, index: int, force: bool) -> None:
        """Somebody detaches, which also aborts a migration or ends its source."""
        for item in chosen(self._attachments(), index):
            attachment_intents.detach(self.db, ROOT, item.id, force=force, epoch=item.epoch)

    @rule(index=st.integers(0, 30), force=st.booleans())
    def detach_late(self, index: int, force: bool) -> None:
        """A stale launcher detaches by what it was told long ago; nothing newer changes."""
        for key in chosen(self.keys, index):
            others = [item for item in self._attachments() if item.id != key.attachment]
            disks = {item.id: item.epoch for item in others}
            for item in others:
                with pytest.raises(Conflict):
                    attachment_intents.detach(
                        self.db, ROOT, item.id, force=force, epoch=item.epoch - 1
                    )
            try:
                attachment_intents.detach(
                    self.db, ROOT, key.attachment, force=force, epoch=key.epoch
                )
            except NotFound:
                assert {item.id: item.epoch for item in self._attachments()} == disks
            kept = [item for item in self._attachments() if item.id != key.attachment]
            assert kept == others

    @rule(index=st.integers(0, 9), vm=st.integers(0, 3))
    def migrate(self, index: int, vm: int) -> None:
        """Somebody begins a migration, as far as that is allowed."""
        for item in chosen(self._attachments(), index):
            name = f"iqn.2026-11.org.example:host{vm}"
            try:
                operation = migrations.migrate(
                    self.db, ROOT, item.id, instance=f"vm{vm}", timeout_s=50
                )
            except Conflict:
                return
            self._note(operation.subject, name)

    @rule(index=st.integers(0, 9))
    def complete(self, index: int) -> None:
        """Somebody completes a migration, as far as that is allowed."""
        for item in chosen([item for item in self._attachments() if item.migrates], index):
            try:
                migrations.complete(self.db, ROOT, item.id)
            except Conflict:
                return

    @rule(index=st.integers(0, 9))
    def renew(self, index: int) -> None:
        """A launcher renews its lease, as far as that is allowed."""
        for item in chosen(self._attachments(), index):
            try:
                leases.renew_attachment(self.db, ROOT, item.id, epoch=item.epoch)
            except Conflict:
                return

    @rule(index=st.integers(0, 30))
    def log_in(self, index: int) -> None:
        """Who was ever told how tries to get in."""
        for key in chosen(self.keys, index):
            self.world.log_in(key)

    @rule(seconds=st.sampled_from([0.0, 60.0, 200.0]))
    def time_passes(self, seconds: float) -> None:
        """The clock is ahead from now on, or right again."""
        self.ahead_s = seconds

    @rule(steps=STEPS)
    def live(self, steps: int | None) -> None:
        """The process makes a pass, or dies within it; the next one begins anew."""
        self._live(steps)

    def _live(self, steps: int | None) -> None:
        self.fuse.left = steps
        try:
            self._pass()
        except BaseException as error:
            if not is_crash(error):
                raise
            self.process = None
        finally:
            self.fuse.left = None

    @rule()
    def rest(self) -> None:
        """The process makes passes until nothing is left to do, commands in flight or not."""
        self._pass_until_rest()

    @rule()
    def target_daemon_dies(self) -> None:
        """tgtd is killed and started anew."""
        self.world.die()

    @rule()
    def commands_hang(self) -> None:
        """Commands are in flight for a long time, or not any more."""
        self.targets.busy = not self.targets.busy

    def _pass(self) -> bool:
        process = self.process
        if process is None:
            disks = DiskStore(self.configuration.state_dir, self.configuration.run_dir)
            images = ImageStore(self.configuration.state_dir, self.chunks)
            blocks = Blocks(self.configuration, self.db, images, disks)
            process = Reconciler(
                self.configuration, self.db, images, disks, self.targets, blocks, DiskWork(),
                self._now,
            )  # fmt: skip
            trio.run(process.adopt)
            self.process = process
        return trio.run(process.reconcile, clock=None if self.real_time else MockClock())

    def _pass_until_rest(self) -> None:
        for _ in range(PASSES_MAX):
            if not self._pass():
                return
        assert self.targets.busy

    @invariant()
    def no_disk_is_split(self) -> None:
        """Who writes to a disk is one attachment, or two of which one takes the place of the other;
        nobody reads what another one writes; what has no row has no session, nor a target."""
        by_iqn = {iqn_of(item.id): item for item in self._attachments()}
        targets, sessions = self.world.look()
        assert sessions <= set(by_iqn), "a session of what has been cut off"
        assert targets <= set(by_iqn), "a target of what has been cut off"
        used = [by_iqn[iqn] for iqn in sessions]
        for item in used:
            others = [o for o in used if o.disk_uuid == item.disk_uuid and o.id != item.id]
            if item.access == "rw" and others:
                (other,) = others
                assert other.access == "rw"
                assert other.migrates == item.id or item.migrates == other.id, "split"

    def teardown(self) -> None:
        """Without crashes all comes to rest: every row has its target and every key its due."""
        try:
            self.ahead_s = 0.0
            self.targets.busy = False
            self._pass_until_rest()
            rows = {item.id: item for item in self._attachments()}
            assert {item.state for item in rows.values()} <= {"ready"}
            assert all(item.problem is None for item in rows.values())
            assert all(operation.finished for operation in inventory.operations(self.db))
            found = trio.run(self.targets.list)
            assert set(found) == {item.number for item in rows.values()}
            for key in self.keys:
                assert self.world.log_in(key) == (key.attachment in rows)
            self.no_disk_is_split()
        finally:
            self.end()

    def end(self) -> None:
        """Leave nothing."""
        self.db.close()
        self.chunks.close()
        shutil.rmtree(self.root)


class TgtHistories(Histories):
    """The same with a real tgtd."""

    real_time = True

    def make_world(self) -> Any:
        """Return the target daemon."""
        return TgtWorld(self.root, self.fuse)

    @property
    def targets(self) -> Any:
        """What the reconciler drives."""
        return self.world.targets

    def end(self) -> None:
        """Leave nothing."""
        self.world.close()
        super().end()


def chosen(items: Sequence[_T], index: int) -> Sequence[_T]:
    """Return one of the items, or none when there is none."""
    return [items[index % len(items)]] if items else []


Histories.TestCase.settings = settings(
    max_examples=HISTORIES, stateful_step_count=40, deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
TgtHistories.TestCase.settings = settings(
    max_examples=TGT_HISTORIES, stateful_step_count=20, deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(300 + 2 * HISTORIES)
class TestHistories(Histories.TestCase):  # type: ignore[misc,valid-type]
    """Whatever dies when, no disk is split."""


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.timeout(300 + 60 * TGT_HISTORIES)
class TestTgtHistories(TgtHistories.TestCase):  # type: ignore[misc,valid-type]
    """Neither is it where tgtd and initiators are real."""
