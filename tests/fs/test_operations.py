"""Operations on a real state database, a real catalogue folder and a real HTTP origin."""

import hashlib
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
import trio
from support.documents import EMAIL, make_endorser, shelve, signed_document, unsigned_document
from support.origins import Fault, OriginServer, Resource, origin_server

from stratocache.cache.catalogue import Catalogues
from stratocache.cache.chunks import ChunkStore
from stratocache.cache.configuration import (
    CatalogueSettings,
    Configuration,
    FetchSettings,
    SpaceSettings,
)
from stratocache.cache.fetch import Fetcher
from stratocache.cache.identifier import encode
from stratocache.cache.images import ImageStore
from stratocache.fs import disk_intents, intents, inventory
from stratocache.fs.acquisition import Acquisition
from stratocache.fs.operation_watch import OperationWatch
from stratocache.fs.operations import Operations
from stratocache.fs.records import Caller, DiskRequest, LaunchRequest, Operation
from stratocache.fs.state import Database

ROOT_CALLER = Caller("root", True)
IMAGE = os.urandom(9 * 512 * 1024 + 1234)
IDENTIFIER = encode(hashlib.sha1(IMAGE).hexdigest())
NOW = datetime.now(UTC).replace(microsecond=0)


@dataclass
class Host:
    """The part of `blockd` that runs operations, on directories of its own."""

    folder: Path
    origin: OriginServer
    resource: Resource
    db: Database
    chunks: ChunkStore
    images: ImageStore
    configuration: Configuration
    woken: list[None] = field(default_factory=list)
    acquisition: Acquisition | None = None

    def publish(self, **fields: object) -> None:
        """Offer the image, or a description of it that is wrong in some way."""
        url = self.origin.url + "/image"
        unsigned = unsigned_document(IMAGE, **{"locations": [url], **fields})  # type: ignore[arg-type]
        document = signed_document(make_endorser(), unsigned, created=NOW - timedelta(days=1))
        shelve(self.folder / "entries", document, IDENTIFIER, EMAIL, NOW - timedelta(days=1))

    def run(self, script: Callable[[Operations], Awaitable[None]]) -> None:
        """Run a script beside the operations, as one process would; its end is their death."""

        async def main() -> None:
            async with httpx.AsyncClient() as client, trio.open_nursery() as nursery:
                acquisition = Acquisition(
                    self.configuration,
                    self.db,
                    Catalogues(self.configuration, client),
                    Fetcher(self.configuration, self.images, self.chunks, client),
                    self.images,
                    nursery,
                )
                acquisition.sweep()
                self.acquisition = acquisition
                operations = Operations(
                    self.db, acquisition, nursery, lambda: self.woken.append(None)
                )
                await operations.look()
                with trio.fail_after(60):
                    await script(operations)
                nursery.cancel_scope.cancel()

        trio.run(main)

    async def end(self, operation: Operation) -> Operation:
        """Wait until an operation has ended."""
        return await trio.to_thread.run_sync(OperationWatch(self.db).wait, operation.id, 60.0)

    async def sent(self, held: Fault) -> None:
        """Wait until an answer has been sent up to where it is held."""
        while not any(line.sent_bytes == held.cut_after_bytes for line in self.origin.log):
            await trio.lowlevel.checkpoint()

    def leftovers(self) -> list[str]:
        """Return what is below the state directory that belongs to images."""
        found = os.listdir(self.configuration.state_dir / "stage")
        found += os.listdir(self.configuration.state_dir / "manifests")
        chunks = (self.configuration.state_dir / "chunks").rglob("*")
        return found + [path.name for path in chunks if len(path.name) == 64]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """A host whose catalogue is a folder and whose origin serves one image."""
    state = tmp_path / "state"
    state.mkdir()
    (tmp_path / "entries").mkdir()
    db = Database(state / "state.db")
    db.migrate()
    chunks = ChunkStore(state / "chunks")
    configuration = Configuration(
        state_dir=state,
        run_dir=tmp_path / "run",
        fetch=FetchSettings(attempts=2),
        space=SpaceSettings(reserve_bytes=0),
        catalogues={
            "stratuslab": CatalogueSettings(
                endpoint=(tmp_path / "entries").as_uri(),
                trusted_fingerprints=(make_endorser().fingerprint,),
            )
        },
    )
    with origin_server() as origin:
        resource = Resource(IMAGE)
        origin.add("/image", resource)
        images = ImageStore(state, chunks)
        yield Host(tmp_path, origin, resource, db, chunks, images, configuration)
    chunks.close()
    db.close()


def test_many_requests_make_one_download(host: Host) -> None:
    """However many operations want one image, its bytes leave the origin once."""
    host.publish()
    asked = [intents.request_fetch(host.db, ROOT_CALLER, IDENTIFIER) for _ in range(8)]

    async def script(operations: Operations) -> None:
        for operation in asked:
            assert (await host.end(operation)).state == "done"

    host.run(script)
    assert host.origin.sent_bytes("/image") == len(IMAGE)
    assert inventory.image(host.db, IDENTIFIER).sha256 == hashlib.sha256(IMAGE).hexdigest()


def test_cached_image_needs_no_catalogue(host: Host) -> None:
    """A verified image is used again while its catalogue and its origin are gone."""
    host.publish()
    host.run(_ending(host, intents.request_fetch(host.db, ROOT_CALLER, IDENTIFIER), "done"))
    (host.folder / "entries").rename(host.folder / "away")
    host.resource.faults.append(Fault(status=404))

    host.run(_ending(host, intents.request_fetch(host.db, ROOT_CALLER, IDENTIFIER), "done"))


def test_cached_image_is_judged_again(host: Host) -> None:
    """An endorser who is no longer trusted refuses the launch of an image that is cached."""
    host.publish()
    host.run(_ending(host, intents.request_fetch(host.db, ROOT_CALLER, IDENTIFIER), "done"))
    distrusting = host.configuration.catalogues["stratuslab"].model_copy(
        update={"trusted_fingerprints": ("00" * 32,)}
    )
    host.configuration = host.configuration.model_copy(
        update={"catalogues": {"stratuslab": distrusting}}
    )
    launch = intents.request_launch(host.db, ROOT_CALLER, LaunchRequest(IDENTIFIER, "vm1"))

    async def script(operations: Operations) -> None:
        while inventory.launch(host.db, "vm1").state != "ending":
            await trio.lowlevel.checkpoint()

    host.run(script)
    error = inventory.operation(host.db, launch.id).error
    assert error is not None
    assert error["code"] == "endorser-untrusted"


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"valid_until": NOW - timedelta(hours=1)}, "entry-expired"),
        ({"deprecated": "hole in it"}, "entry-deprecated"),
        ({"algorithms": ["SHA-1"]}, "digest-too-weak"),
        ({"digests": {"SHA-256": "00" * 32}}, "digest-mismatch"),
        ({"size_bytes": len(IMAGE) + 1}, "size-mismatch"),
        ({"size_bytes": len(IMAGE) - 1}, "size-mismatch"),
        ({"compression": "gz"}, "source-corrupt"),
        ({"image_format": "qcow2"}, "image-format"),
        ({"locations": ["http://127.0.0.1:9/nobody"]}, "origin-failed"),
    ],
)
def test_refusals_leave_nothing(host: Host, fields: dict[str, object], code: str) -> None:
    """Each fault ends the operation with its own code, and no row, stage, manifest or chunk stays."""
    host.publish(**fields)

    host.run(_ending(host, intents.request_fetch(host.db, ROOT_CALLER, IDENTIFIER), "failed", code))
    assert inventory.images(host.db) == []
    assert host.leftovers() == []


def test_missing_image_and_missing_reference_are_told_apart(host: Host) -> None:
    """404 of every location and an identifier that nobody knows have codes of their own."""
    host.publish()
    host.resource.faults.append(Fault(status=404))
    gone = intents.request_fetch(host.db, ROOT_CALLER, IDENTIFIER)
    host.run(_ending(host, gone, "failed", "location-not-found"))
    unknown = intents.request_fetch(host.db, ROOT_CALLER, "A" * 27)
    host.run(_ending(host, unknown, "failed", "reference-unknown"))

    assert host.leftovers() == []


def test_cancelled_fetch_leaves_nothing(host: Host) -> None:
    """Cancelling in the middle of a download ends the operation and removes every trace."""
    host.publish()
    held = Fault(cut_after_bytes=100_000, hold=threading.Event())
    host.resource.faults.append(held)
    operation = intents.request_fetch(host.db, ROOT_CALLER, IDENTIFIER)

    async def script(operations: Operations) -> None:
        await host.sent(held)
        intents.request_cancel(host.db, ROOT_CALLER, operation.id)
        await operations.look()
        ended = await host.end(operation)
        assert ended.state == "cancelled"

    host.run(script)
    assert held.hold is not None
    held.hold.set()
    assert inventory.images(host.db) == []
    assert host.leftovers() == []


def test_cancelling_one_of_two_keeps_the_flight(host: Host) -> None:
    """A fetch that two wait for goes on when one of them is cancelled."""
    host.publish()
    held = Fault(cut_after_bytes=100_000, hold=threading.Event())
    host.resource.faults.append(held)
    first = intents.request_fetch(host.db, ROOT_CALLER, IDENTIFIER)
    second = intents.request_fetch(host.db, ROOT_CALLER, IDENTIFIER)

    async def script(operations: Operations) -> None:
        assert host.acquisition is not None
        while host.acquisition.statistics().get(IDENTIFIER) != 2:
            await trio.lowlevel.checkpoint()
        await host.sent(held)
        intents.request_cancel(host.db, ROOT_CALLER, first.id)
        await operations.look()
        assert (await host.end(first)).state == "cancelled"
        assert held.hold is not None
        held.hold.set()
        assert (await host.end(second)).state == "done"

    host.run(script)
    assert host.origin.sent_bytes("/image") == len(IMAGE)


def test_fetch_goes_on_after_a_restart(host: Host) -> None:
    """A fetch that the death of the process interrupts is continued by the next one, not repeated."""
    host.publish()
    held = Fault(cut_after_bytes=4_000_000, hold=threading.Event())
    host.resource.faults.append(held)
    operation = intents.request_fetch(host.db, ROOT_CALLER, IDENTIFIER)

    part = host.configuration.state_dir / "stage" / IDENTIFIER / "source.part"

    async def die(operations: Operations) -> None:
        while not part.exists() or part.stat().st_size < 500_000:
            await trio.lowlevel.checkpoint()

    host.run(die)
    assert held.hold is not None
    held.hold.set()
    assert inventory.operation(host.db, operation.id).state == "running"
    host.run(_ending(host, operation, "done"))
    assert host.origin.sent_bytes("/image") < 2 * len(IMAGE)
    assert any(request.range for request in host.origin.log)


def test_clone_smaller_than_its_image_is_refused(host: Host) -> None:
    """A clone must hold its image."""
    host.publish()
    request = DiskRequest(reference=IDENTIFIER, size_bytes=512)
    operation = disk_intents.create_disk(host.db, ROOT_CALLER, request)

    host.run(_ending(host, operation, "failed", "size-too-small"))
    assert inventory.disks(host.db, ROOT_CALLER) == []


def test_launch_records_disk_and_attachments_once(host: Host) -> None:
    """A launch's rows are the same however often its task runs."""
    host.publish()
    request = LaunchRequest(IDENTIFIER, "vm1", readonly=(IDENTIFIER,))
    operation = intents.request_launch(host.db, ROOT_CALLER, request)

    async def script(operations: Operations) -> None:
        while inventory.launch(host.db, "vm1").boot_disk is None or not host.woken:
            await trio.lowlevel.checkpoint()

    host.run(script)
    image = inventory.image(host.db, IDENTIFIER)
    runner = Operations(host.db, None, None, lambda: None)  # type: ignore[arg-type]
    runner.record_launch(operation, request, image, [image])
    items = inventory.attachments(host.db, instance="vm1")
    assert [(item.role, item.access) for item in items] == [("boot", "rw"), ("readonly", "ro")]
    assert [disk.uuid for disk in inventory.disks(host.db, ROOT_CALLER)] == [operation.id]


def test_launches_of_a_cached_image_are_recorded_together(host: Host) -> None:
    """Once an image is here, a look records all that want it; one that cannot be leaves nothing."""
    host.publish()
    host.run(_ending(host, intents.request_fetch(host.db, ROOT_CALLER, IDENTIFIER), "done"))
    names = ["vm1", "vm2", "vm3"]
    launches = [
        intents.request_launch(
            host.db, ROOT_CALLER,
            LaunchRequest(IDENTIFIER, name, size_bytes=512 if name == "vm2" else None),
        )
        for name in names
    ]  # fmt: skip
    clone = disk_intents.create_disk(host.db, ROOT_CALLER, DiskRequest(reference=IDENTIFIER))
    absent = intents.request_launch(host.db, ROOT_CALLER, LaunchRequest("local:absent", "vm4"))

    async def script(operations: Operations) -> None:
        while inventory.launch(host.db, "vm4").state != "ending":
            await trio.lowlevel.checkpoint()

    host.run(script)
    found = {disk.uuid for disk in inventory.disks(host.db, ROOT_CALLER)}
    assert found == {launches[0].id, launches[2].id, clone.subject}
    states = [inventory.launch(host.db, name).state for name in names]
    assert states == ["preparing", "ending", "preparing"]
    held = [len(inventory.attachments(host.db, instance=name)) for name in names]
    assert held == [1, 0, 1]
    codes = [
        (inventory.operation(host.db, item.id).error or {}).get("code")
        for item in (*launches, absent)
    ]
    assert codes[:3] == [None, "size-too-small", None]
    assert codes[3] is not None


def _ending(
    host: Host, operation: Operation, state: str, code: str | None = None
) -> Callable[[Operations], Awaitable[None]]:
    async def script(operations: Operations) -> None:
        ended = await host.end(operation)
        assert (ended.state, (ended.error or {}).get("code")) == (state, code), ended.error

    return script
