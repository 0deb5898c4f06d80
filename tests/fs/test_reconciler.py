"""The reconciler against crashes at any step: what was asked for is what comes to be."""

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import trio
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support.crashing import (
    CrashingDatabase,
    CrashingImages,
    CrashingTargets,
    Fuse,
    chosen,
    dying,
    fresh_configuration,
    is_crash,
)
from support.disk_daemon import DiskDaemon

from stratocache.cache.chunks import CHUNK_BYTES, ChunkStore
from stratocache.cache.configuration import Configuration
from stratocache.cache.entry import Endorser, Entry
from stratocache.cache.errors import Conflict, StratocacheError
from stratocache.cache.images import ImageStore
from stratocache.fs import (
    attachment_intents,
    disk_intents,
    inventory,
    launch_intents,
    snapshot_intents,
)
from stratocache.fs.disks import DiskStore
from stratocache.fs.operations import Operations
from stratocache.fs.overlay import BlockSource, Overlay
from stratocache.fs.records import Caller, Disk, DiskRequest, LaunchRequest, SaveRequest
from stratocache.fs.state import now

ROOT_CALLER = Caller("root", "admin")
IMAGE = "MMZu9WvwKIro-rtBQfDk4PsKO7_"
DISK_BYTES = 2 * CHUNK_BYTES + 4096


class CrashingOverlay(Overlay):
    """The real engine in a process that may die around each change of its layers."""

    fuse: Fuse
    opened: set[Overlay]

    def close(self) -> None:
        """As the real one, and dying need not."""
        self.opened.discard(self)
        super().close()

    async def freeze(self) -> None:
        """As the real one."""
        self.fuse.step()
        await super().freeze()
        self.fuse.step()

    async def rebase(self, base: BlockSource, base_name: str) -> None:
        """As the real one."""
        self.fuse.step()
        await super().rebase(base, base_name)
        self.fuse.step()

    async def grow(self, size_bytes: int) -> None:
        """As the real one."""
        self.fuse.step()
        await super().grow(size_bytes)
        self.fuse.step()

    async def fill(self, progress: Callable[[int], None], *, reflink: bool) -> None:
        """As the real one, which may die after each chunk."""

        def step(done_bytes: int) -> None:
            progress(done_bytes)
            self.fuse.step()

        await super().fill(step, reflink=reflink)


class CrashingDisks(DiskStore):
    """Real disk files, changed by a process that may die around each step."""

    def __init__(self, configuration: Configuration, fuse: Fuse) -> None:
        super().__init__(configuration.state_dir, configuration.run_dir)
        self.fuse = fuse
        self.opened: set[Overlay] = set()
        for name in (
            "create_blank", "create_clone", "clone_raw_snapshot", "delete", "adopt_overlay",
            "rollback_overlay", "finish_promotion", "freeze_raw", "grow_raw", "snapshot_raw",
            "rollback_raw", "delete_raw_snapshot",
        ):  # fmt: skip
            setattr(self, name, dying(getattr(self, name), fuse))

    def open_overlay(self, uuid: str, base_reader_of: Callable[[str], BlockSource]) -> Overlay:
        """As the real one."""
        overlay = CrashingOverlay(self.files(uuid), base_reader_of)
        overlay.fuse = self.fuse
        overlay.opened = self.opened
        self.opened.add(overlay)
        return overlay

    def die(self) -> None:
        """Close what is open, as the kernel does when a process ends."""
        for overlay in list(self.opened):
            overlay.close()


class Crashes(RuleBasedStateMachine):
    """Intents, passes that die, and deaths of the target daemon, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="stratocache-reconciler-"))
        self.configuration = fresh_configuration(self.root)
        self.fuse = Fuse()
        self.targets = CrashingTargets(self.fuse)
        self.db = CrashingDatabase(self.configuration.database, self.fuse)
        self.db.migrate()
        self.chunks = ChunkStore(self.configuration.state_dir / "chunks")
        self._publish()
        self.launched = 0
        self.written = 0
        self.model: dict[str, bytes] = {}
        """What each disk has, as far as its guest knows."""
        self.kept: dict[str, list[bytes]] = {}
        """What each snapshot may have: whatever its disk had until it was frozen."""
        self.seen: set[str] = set()

    def _publish(self) -> None:
        images = ImageStore(self.configuration.state_dir, self.chunks)
        draft = images.begin()
        draft.add([b"x" * CHUNK_BYTES])
        images.publish(IMAGE, draft.manifest())
        images.finish(draft)
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

    def _snapshots(self) -> list[Any]:
        return self.db.rows("SELECT * FROM snapshots ORDER BY number")

    @initialize()
    def begin(self) -> None:
        """There is a blank disk, and an instance with a clone."""
        self.create_blank()
        self.launch(volatile=False, disks=False)
        self.live()

    @rule()
    def create_blank(self) -> None:
        """Somebody asks for a blank disk."""
        disk_intents.create_disk(self.db, ROOT_CALLER, DiskRequest(size_bytes=DISK_BYTES))

    @rule(index=st.integers(0, 5), block=st.integers(0, DISK_BYTES // 4096 - 1))
    def write(self, index: int, block: int) -> None:
        """A guest writes a block and flushes."""
        for uuid in chosen(self._uuids(), index):
            disk = inventory.find_disk(self.db, uuid)
            if disk is None or inventory.open_operations(self.db, uuid, "rollback", "resize"):
                return
            whole = bytearray(self._model_of(uuid))
            self.written += 1
            offset = min(block * 4096, disk.size_bytes - 4096)
            piece = self.written.to_bytes(4, "big") * 1024
            self._write(disk, offset, piece)
            whole[offset : offset + 4096] = piece
            self.model[uuid] = bytes(whole)
            for snapshot in inventory.snapshots(self.db, uuid):
                if snapshot.state == "creating":
                    self.kept[snapshot.id].append(self.model[uuid])

    @rule(index=st.integers(0, 5))
    def snapshot(self, index: int) -> None:
        """Somebody asks for a snapshot, as far as that is allowed."""
        for uuid in chosen(self._uuids(), index):
            try:
                operation = snapshot_intents.create_snapshot(self.db, ROOT_CALLER, uuid)
            except Conflict:
                return
            self.kept[operation.subject] = [self._model_of(uuid)]

    @rule(index=st.integers(0, 5))
    def delete_snapshot(self, index: int) -> None:
        """Somebody deletes a snapshot, as far as that is allowed."""
        for snapshot in chosen(self._snapshots(), index):
            with suppress(Conflict):
                snapshot_intents.delete_snapshot(
                    self.db, ROOT_CALLER, snapshot["disk_uuid"], snapshot["id"]
                )

    @rule(index=st.integers(0, 5))
    def roll_back(self, index: int) -> None:
        """Somebody rolls a disk back, as far as that is allowed."""
        for snapshot in chosen(self._snapshots(), index):
            with suppress(Conflict):
                snapshot_intents.rollback(
                    self.db, ROOT_CALLER, snapshot["disk_uuid"], snapshot["id"]
                )

    @rule(index=st.integers(0, 5))
    def clone(self, index: int) -> None:
        """Somebody clones a snapshot, as far as that is allowed."""
        for snapshot in chosen(self._snapshots(), index):
            with suppress(Conflict):
                disk_intents.create_disk(self.db, ROOT_CALLER, DiskRequest(snapshot=snapshot["id"]))

    @rule(index=st.integers(0, 5), blocks=st.integers(1, 200))
    def grow(self, index: int, blocks: int) -> None:
        """Somebody grows a disk, as far as that is allowed."""
        for uuid in chosen(self._uuids(), index):
            disk = inventory.find_disk(self.db, uuid)
            assert disk is not None
            with suppress(Conflict):
                disk_intents.resize_disk(
                    self.db, ROOT_CALLER, uuid, disk.size_bytes + 4096 * blocks
                )

    @rule(index=st.integers(0, 5))
    def hydrate(self, index: int) -> None:
        """Somebody wants a disk to be complete."""
        for uuid in chosen(self._uuids(), index):
            with suppress(Conflict):
                disk_intents.hydrate_disk(self.db, ROOT_CALLER, uuid)

    @rule(index=st.integers(0, 5))
    def save(self, index: int) -> None:
        """Somebody saves a disk as an image."""
        for uuid in chosen(self._uuids(), index):
            with suppress(Conflict):
                operation = snapshot_intents.save_disk(
                    self.db, ROOT_CALLER, uuid, SaveRequest(title="saved")
                )
                self.kept[operation.request["snapshot"]] = [self._model_of(uuid)]

    @rule(volatile=st.booleans(), disks=st.booleans())
    def launch(self, volatile: bool, disks: bool) -> None:
        """Somebody launches an instance, and its task records what it wants."""
        self.launched += 1
        extra = tuple(self._uuids()[:1]) if disks else ()
        request = LaunchRequest(reference=IMAGE, instance=f"vm{self.launched}", disks=extra)
        try:
            operation = launch_intents.request_launch(self.db, ROOT_CALLER, request)
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
        for uuid in chosen(self._uuids(), index):
            try:
                attachment_intents.attach(
                    self.db, ROOT_CALLER, uuid, instance=f"i{index}", access=access
                )
            except Conflict:
                return

    @rule(index=st.integers(0, 5))
    def detach(self, index: int) -> None:
        """Somebody detaches."""
        for item in chosen(inventory.attachments(self.db), index):
            attachment_intents.detach(self.db, ROOT_CALLER, item.id)

    @rule(index=st.integers(0, 3), failed=st.booleans())
    def halt(self, index: int, failed: bool) -> None:
        """Somebody halts an instance, as far as that is allowed."""
        for launch in chosen(inventory.launches(self.db), index):
            try:
                launch_intents.halt(self.db, ROOT_CALLER, launch.instance, failed=failed)
            except Conflict:
                return

    @rule(index=st.integers(0, 5), with_snapshots=st.booleans())
    def delete(self, index: int, with_snapshots: bool) -> None:
        """Somebody deletes a disk, as far as that is allowed."""
        for uuid in chosen(self._uuids(), index):
            try:
                disk_intents.delete_disk(self.db, ROOT_CALLER, uuid, with_snapshots=with_snapshots)
            except Conflict:
                return

    @rule()
    def target_daemon_dies(self) -> None:
        """tgtd is killed and forgets everything."""
        self.targets.made.clear()

    @rule(steps=st.integers(0, 60))
    def crash(self, steps: int) -> None:
        """A process dies after some steps."""
        self.fuse.left = steps
        try:
            self._live()
        except BaseException as error:
            if not is_crash(error):
                raise
        finally:
            self.fuse.left = None
        self._observe()

    @rule()
    def live(self) -> None:
        """A process brings everything to rest."""
        self._live()
        self._observe()

    def _live(self) -> None:
        """Run a new process until nothing is left to do."""
        disks = CrashingDisks(self.configuration, self.fuse)
        images = CrashingImages(self.configuration.state_dir, self.chunks, self.fuse)
        daemon = DiskDaemon(self.configuration, self.db, images, disks, self.targets)
        try:
            trio.run(daemon.live, DiskDaemon.rest)
        finally:
            disks.die()

    # What guests see.

    def _with_overlay(self, disk: Disk, use: Callable[[Overlay], Any]) -> Any:
        images = ImageStore(self.configuration.state_dir, self.chunks)
        store = DiskStore(self.configuration.state_dir, self.configuration.run_dir)

        async def main() -> Any:
            overlay = store.open_overlay(disk.uuid, images.reader)
            try:
                return await use(overlay)
            finally:
                overlay.close()

        return trio.run(main)

    def _is_raw(self, uuid: str) -> bool:
        store = DiskStore(self.configuration.state_dir, self.configuration.run_dir)
        return store.form(uuid) == "raw"

    def _write(self, disk: Disk, offset: int, piece: bytes) -> None:
        if self._is_raw(disk.uuid):
            path = self.configuration.state_dir / "disks" / disk.uuid / "data"
            with path.open("r+b") as file:
                file.seek(offset)
                file.write(piece)
            return

        async def write(overlay: Overlay) -> None:
            await overlay.write(offset, piece)
            await overlay.flush()

        self._with_overlay(disk, write)

    def _content(self, uuid: str) -> bytes:
        disk = inventory.find_disk(self.db, uuid)
        assert disk is not None
        if self._is_raw(uuid):
            return (self.configuration.state_dir / "disks" / uuid / "data").read_bytes()

        async def read(overlay: Overlay) -> bytes:
            return bytes(await overlay.read(0, overlay.size_bytes))

        content: bytes = self._with_overlay(disk, read)
        return content

    def _model_of(self, uuid: str) -> bytes:
        """Return what a disk has; of a new one that is looked up once."""
        if uuid not in self.model:
            disk = inventory.find_disk(self.db, uuid)
            assert disk is not None
            content = self._content(uuid)
            if disk.base_snapshot is not None:
                allowed = self.kept[disk.base_snapshot]
                assert content in [item.ljust(len(content), b"\0") for item in allowed]
            elif disk.base_image is not None:
                assert content == (b"x" * CHUNK_BYTES).ljust(len(content), b"\0")
            else:
                assert content == bytes(len(content))
            self.model[uuid] = content
        return self.model[uuid]

    def _observe(self) -> None:
        """Look at what has been changed since the last look."""
        for uuid in self._uuids():
            self._model_of(uuid)
        for operation in reversed(inventory.operations(self.db)):
            if operation.state != "done" or operation.id in self.seen:
                continue
            self.seen.add(operation.id)
            uuid = operation.subject
            if operation.kind in ("resize", "rollback") and inventory.find_disk(self.db, uuid):
                content = self._content(uuid)
                allowed = [self._model_of(uuid)]
                if operation.kind == "rollback":
                    allowed = self.kept[operation.request["snapshot"]]
                assert content in [item.ljust(len(content), b"\0") for item in allowed]
                self.model[uuid] = content

    @invariant()
    def no_disk_has_two_writers(self) -> None:
        """No two read-write targets have one backing file."""
        writers = [item.backing for item in self.targets.made.values() if not item.read_only]
        assert len(writers) == len(set(writers))

    def teardown(self) -> None:
        """A process without a crash brings everything to rest, and each side accounts for the
        other."""
        try:
            self._live()
            self._observe()
            self._check_rows()
            self._check_files()
            for uuid in self._uuids():
                assert self._content(uuid) == self._model_of(uuid)
        finally:
            self.db.close()
            self.chunks.close()
            shutil.rmtree(self.root)

    def _check_rows(self) -> None:
        attachments = inventory.attachments(self.db)
        assert {item.state for item in attachments} <= {"ready"}
        assert {item.state for item in inventory.launches(self.db)} <= {"active"}
        for operation in inventory.operations(self.db):
            assert operation.finished, operation
            if operation.state != "done":
                gone = (operation.error or {})["code"] in ("disk-deleted", "cancelled")
                assert operation.kind in ("launch", "attach") or gone, operation
        for item in attachments:
            disk = inventory.find_disk(self.db, item.disk_uuid or "")
            assert disk is None or item.generation == disk.generation

    def _check_files(self) -> None:
        state, run = self.configuration.state_dir, self.configuration.run_dir
        disks = {row["uuid"]: row for row in self.db.rows("SELECT * FROM disks")}
        assert self._uuids() == list(disks)
        assert set(os.listdir(state / "disks")) == set(disks)
        assert os.listdir(state / "stage") == []
        attachments = inventory.attachments(self.db)
        assert set(self.targets.made) == {item.number for item in attachments}
        assert set(os.listdir(run / "secrets")) == {item.id for item in attachments}
        images = {image.id for image in inventory.images(self.db)}
        snapshots = {row["id"] for row in self._snapshots()}
        bases = {row["base_manifest"] for row in disks.values()} - {None}
        manifests = {name.removesuffix(".caibx") for name in os.listdir(state / "manifests")}
        assert manifests == images | snapshots | bases
        store = DiskStore(state, run)
        for uuid, row in disks.items():
            assert store.form(uuid) == row["form"]
            names = set(os.listdir(state / "disks" / uuid))
            if row["form"] == "raw":
                assert names == {"data"}
            else:
                layout = store.layout(uuid)
                assert (layout.base, layout.frozen) == (row["base_manifest"], None)
                assert names == {"layout.json", f"{layout.top}.data", f"{layout.top}.bitmap"}


Crashes.TestCase.settings = settings(
    max_examples=30, stateful_step_count=25, deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip


class TestCrashes(Crashes.TestCase):  # type: ignore[misc,valid-type]
    """Whatever dies when, the next passes finish or undo what was begun."""
