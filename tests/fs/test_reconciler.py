"""The reconciler against crashes at any step: what was asked for is what comes to be."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trio
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from stratocache.cache.chunks import CHUNK_BYTES, ChunkStore
from stratocache.cache.configuration import Configuration, SpaceSettings
from stratocache.cache.entry import Endorser, Entry
from stratocache.cache.errors import Conflict, StratocacheError
from stratocache.cache.images import ImageStore
from stratocache.fs import intents, inventory
from stratocache.fs.blocks import Blocks
from stratocache.fs.disks import DiskStore
from stratocache.fs.operations import Operations
from stratocache.fs.reconciler import Reconciler
from stratocache.fs.records import Caller, DiskForm, DiskRequest, LaunchRequest
from stratocache.fs.state import Database, now
from stratocache.fs.target import LUN, ActualTarget, Session, Target

ROOT_CALLER = Caller("root", True)
IMAGE = "MMZu9WvwKIro-rtBQfDk4PsKO7_"


class Crash(BaseException):
    """The process dies here."""


class Fuse:
    """Burns down by one at each step, and kills the process when it has burnt down."""

    def __init__(self) -> None:
        self.left: int | None = None

    def step(self) -> None:
        """Take one step; raises `Crash` when it was the last."""
        if self.left is not None:
            if self.left <= 0:
                raise Crash
            self.left -= 1


class CrashingDatabase(Database):
    """A state database whose process may die before a transaction or right after its commit."""

    def __init__(self, path: Path, fuse: Fuse) -> None:
        super().__init__(path)
        self.fuse = fuse

    @contextmanager
    def transaction(self) -> Iterator[Any]:
        """As the real one."""
        self.fuse.step()
        with super().transaction() as connection:
            yield connection
        self.fuse.step()


class CrashingDisks(DiskStore):
    """Real disk files, made by a process that may die around each step."""

    fuse: Fuse

    def create_blank(self, uuid: str, size_bytes: int) -> DiskForm:
        """As the real one."""
        self.fuse.step()
        form = super().create_blank(uuid, size_bytes)
        self.fuse.step()
        return form

    def create_clone(self, uuid: str, size_bytes: int, image: Any) -> DiskForm:
        """As the real one."""
        self.fuse.step()
        form = super().create_clone(uuid, size_bytes, image)
        self.fuse.step()
        return form

    def delete(self, uuid: str) -> None:
        """As the real one."""
        self.fuse.step()
        super().delete(uuid)
        self.fuse.step()


class Targets:
    """A target daemon's memory, which outlives `blockd` and dies on its own."""

    def __init__(self, fuse: Fuse) -> None:
        self.fuse = fuse
        self.made: dict[int, Target] = {}

    async def ping(self) -> None:
        """Answer."""

    async def sessions(self, number: int) -> tuple[Session, ...]:
        """Nobody is logged in."""
        return ()

    async def list(self) -> dict[int, ActualTarget]:
        """Return what there is."""
        self.fuse.step()
        return {number: actual_of(target) for number, target in self.made.items()}

    async def create(self, target: Target) -> None:
        """Make or remake a target."""
        self.fuse.step()
        assert target.backing.parent.name in ("disks", "images") or target.backing.exists()
        self.made[target.number] = target
        self.fuse.step()

    async def remove(self, number: int) -> None:
        """Remove a target."""
        self.fuse.step()
        self.made.pop(number, None)
        self.fuse.step()


class Crashes(RuleBasedStateMachine):
    """Intents, passes that die, and deaths of the target daemon, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="stratocache-reconciler-"))
        self.configuration = Configuration(
            state_dir=self.root / "state",
            run_dir=self.root / "run",
            space=SpaceSettings(reserve_bytes=0),
        )
        self.configuration.state_dir.mkdir()
        self.configuration.run_dir.mkdir()
        self.fuse = Fuse()
        self.targets = Targets(self.fuse)
        self.db = CrashingDatabase(self.configuration.database, self.fuse)
        self.db.migrate()
        chunks = ChunkStore(self.configuration.state_dir / "chunks")
        self.images = ImageStore(self.configuration.state_dir, chunks)
        self._publish()
        self.launched = 0

    def _publish(self) -> None:
        draft = self.images.begin()
        draft.add([b"x" * CHUNK_BYTES])
        self.images.publish(IMAGE, draft.manifest())
        self.images.finish(draft)
        entry = Entry(
            catalogue="stratuslab", identifier=IMAGE, size_bytes=CHUNK_BYTES, digests={},
            locations=(), endorser=Endorser(email="a@example.org", subject="", issuer=""),
            endorsed_at="2026-01-01T00:00:00Z", trust="signed",  # type: ignore[arg-type]
        )  # fmt: skip
        self.db.connection.execute(
            "INSERT INTO images (id, state, size_bytes, entry, created_at) "
            "VALUES (?, 'verified', ?, ?, ?)",
            (IMAGE, CHUNK_BYTES, entry.model_dump_json(), now()),
        )

    def _uuids(self, state: str = "available") -> list[str]:
        rows = self.db.rows("SELECT uuid FROM disks WHERE state = ? ORDER BY number", state)
        return [row["uuid"] for row in rows]

    @rule()
    def create_blank(self) -> None:
        """Somebody asks for a blank disk."""
        intents.create_disk(self.db, ROOT_CALLER, DiskRequest(size_bytes=1 << 20))

    @rule(volatile=st.booleans(), disks=st.booleans())
    def launch(self, volatile: bool, disks: bool) -> None:
        """Somebody launches an instance, and its task records what it wants."""
        self.launched += 1
        extra = tuple(self._uuids()[:1]) if disks else ()
        request = LaunchRequest(reference=IMAGE, instance=f"vm{self.launched}", disks=extra)
        try:
            operation = intents.request_launch(self.db, ROOT_CALLER, request)
        except Conflict:
            return
        image = inventory.image(self.db, IMAGE)
        runner = Operations(self.db, None, None, lambda: None)  # type: ignore[arg-type]
        try:
            runner.record_launch(operation, request, image, [image] if volatile else [])
        except StratocacheError as error:
            runner.record_failure(operation, error)

    @rule(index=st.integers(0, 5), access=st.sampled_from(["rw", "ro"]))
    def attach(self, index: int, access: Any) -> None:
        """Somebody attaches a disk, as far as that is allowed."""
        for uuid in self._uuids()[index : index + 1]:
            try:
                intents.attach(self.db, ROOT_CALLER, uuid, instance=f"i{index}", access=access)
            except Conflict:
                return

    @rule(index=st.integers(0, 5))
    def detach(self, index: int) -> None:
        """Somebody detaches."""
        for item in inventory.attachments(self.db)[index : index + 1]:
            intents.detach(self.db, ROOT_CALLER, item.id)

    @rule(index=st.integers(0, 3))
    def halt(self, index: int) -> None:
        """Somebody halts an instance, as far as that is allowed."""
        for launch in inventory.launches(self.db)[index : index + 1]:
            try:
                intents.halt(self.db, ROOT_CALLER, launch.instance)
            except Conflict:
                return

    @rule(index=st.integers(0, 5))
    def delete(self, index: int) -> None:
        """Somebody deletes a disk, as far as that is allowed."""
        for uuid in self._uuids()[index : index + 1]:
            try:
                intents.delete_disk(self.db, ROOT_CALLER, uuid)
            except Conflict:
                return

    @rule()
    def target_daemon_dies(self) -> None:
        """tgtd is killed and forgets everything."""
        self.targets.made.clear()

    @rule(steps=st.integers(0, 25))
    def crash(self, steps: int) -> None:
        """A pass dies after some steps."""
        self.fuse.left = steps
        try:
            self._pass()
        except BaseException as error:
            if not _is_crash(error):
                raise
        finally:
            self.fuse.left = None

    def _pass(self) -> bool:
        """Run one pass of a new process."""
        disks = CrashingDisks(self.configuration.state_dir, self.configuration.run_dir)
        disks.fuse = self.fuse
        blocks = Blocks(self.configuration, self.db, self.images, disks)
        reconciler = Reconciler(
            self.configuration, self.db, self.images, disks, self.targets, blocks
        )
        return trio.run(reconciler.reconcile)

    @invariant()
    def no_disk_has_two_writers(self) -> None:
        """No two read-write targets have one backing file."""
        writers = [item.backing for item in self.targets.made.values() if not item.read_only]
        assert len(writers) == len(set(writers))

    def teardown(self) -> None:
        """Passes without a crash bring everything to rest, and each side accounts for the other."""
        try:
            while self._pass():
                pass
            self._check()
        finally:
            self.db.close()
            self.images.chunks.close()
            shutil.rmtree(self.root)

    def _check(self) -> None:
        disks = {row["uuid"]: row["form"] for row in self.db.rows("SELECT * FROM disks")}
        assert self._uuids() == list(disks)
        assert set(os.listdir(self.configuration.state_dir / "disks")) == set(disks)
        assert os.listdir(self.configuration.state_dir / "stage") == []
        attachments = inventory.attachments(self.db)
        assert {item.state for item in attachments} <= {"ready"}
        assert set(self.targets.made) == {item.number for item in attachments}
        secrets = set(os.listdir(self.configuration.run_dir / "secrets"))
        assert secrets == {item.id for item in attachments}
        assert {item.state for item in inventory.launches(self.db)} <= {"active"}
        for operation in inventory.operations(self.db):
            assert operation.finished, operation
            assert operation.state == "done" or operation.kind in ("launch", "attach"), operation


def actual_of(target: Target) -> ActualTarget:
    """Describe a target as a daemon that has it would."""
    return ActualTarget(
        number=target.number,
        iqn=target.iqn,
        luns=(LUN,),
        backing=str(target.backing),
        online=True,
        read_only=target.read_only,
        serial=target.serial,
        accounts=(target.chap_username,),
        acl=(target.initiator or "ALL",),
    )


def _is_crash(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(_is_crash(inner) for inner in error.exceptions)
    return isinstance(error, Crash)


Crashes.TestCase.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip


class TestCrashes(Crashes.TestCase):  # type: ignore[misc,valid-type]
    """Whatever dies when, the next passes finish or undo what was begun."""
