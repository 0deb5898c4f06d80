"""Operations on a real state database, a real catalogue folder and a real HTTP origin."""

import hashlib
import threading
from collections.abc import Awaitable, Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import trio
from support.operation_host import IDENTIFIER, IMAGE, NOW, ROOT_CALLER, Host, operation_host
from support.origins import Fault

from stratocache.fs import disk_intents, image_intents, inventory, launch_intents, operation_intents
from stratocache.fs.operations import Operations
from stratocache.fs.records import DiskRequest, LaunchRequest, Operation


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """A host whose catalogue is a folder and whose origin serves one image."""
    with operation_host(tmp_path) as host:
        yield host


def test_many_requests_make_one_download(host: Host) -> None:
    """However many operations want one image, its bytes leave the origin once."""
    host.publish()
    asked = [image_intents.request_fetch(host.db, ROOT_CALLER, IDENTIFIER) for _ in range(8)]

    async def script(operations: Operations) -> None:
        for operation in asked:
            assert (await host.end(operation)).state == "done"

    host.run(script)
    assert host.origin.sent_bytes("/image") == len(IMAGE)
    assert inventory.image(host.db, IDENTIFIER).sha256 == hashlib.sha256(IMAGE).hexdigest()


def test_cached_image_needs_no_catalogue(host: Host) -> None:
    """A verified image is used again while its catalogue and its origin are gone."""
    host.publish()
    host.run(_ending(host, image_intents.request_fetch(host.db, ROOT_CALLER, IDENTIFIER), "done"))
    (host.folder / "entries").rename(host.folder / "away")
    host.resource.faults.append(Fault(status=404))

    host.run(_ending(host, image_intents.request_fetch(host.db, ROOT_CALLER, IDENTIFIER), "done"))


@pytest.mark.parametrize("reference", ['Çäk"õ', "nowhere:x", "local:" + IDENTIFIER, "a/../b"])
def test_reference_that_is_none_fails_its_operation_alone(host: Host, reference: str) -> None:
    """A launch, a clone and a fetch of what is no reference fail; what looks after all operations
    goes on, also with those that come together."""
    host.publish()
    wrong = [
        launch_intents.request_launch(host.db, ROOT_CALLER, LaunchRequest(reference, "vm1")),
        disk_intents.create_disk(host.db, ROOT_CALLER, DiskRequest(reference=reference)),
        image_intents.request_fetch(host.db, ROOT_CALLER, reference),
    ]
    right = image_intents.request_fetch(host.db, ROOT_CALLER, IDENTIFIER)

    async def script(operations: Operations) -> None:
        assert (await host.end(right)).state == "done"
        await operations.look()
        for operation in wrong[1:]:
            assert (await host.end(operation)).state == "failed"

    host.run(script)
    error = inventory.operation(host.db, wrong[0].id).error
    assert error is not None
    assert inventory.launch(host.db, "vm1").state == "ending"


def test_cached_image_is_judged_again(host: Host) -> None:
    """An endorser who is no longer trusted refuses the launch of an image that is cached."""
    host.publish()
    host.run(_ending(host, image_intents.request_fetch(host.db, ROOT_CALLER, IDENTIFIER), "done"))
    distrusting = host.configuration.catalogues["stratuslab"].model_copy(
        update={"trusted_fingerprints": ("00" * 32,)}
    )
    host.configuration = host.configuration.model_copy(
        update={"catalogues": {"stratuslab": distrusting}}
    )
    launch = launch_intents.request_launch(host.db, ROOT_CALLER, LaunchRequest(IDENTIFIER, "vm1"))

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

    host.run(
        _ending(host, image_intents.request_fetch(host.db, ROOT_CALLER, IDENTIFIER), "failed", code)
    )
    assert inventory.images(host.db) == []
    assert host.leftovers() == []


def test_missing_image_and_missing_reference_are_told_apart(host: Host) -> None:
    """404 of every location and an identifier that nobody knows have codes of their own."""
    host.publish()
    host.resource.faults.append(Fault(status=404))
    gone = image_intents.request_fetch(host.db, ROOT_CALLER, IDENTIFIER)
    host.run(_ending(host, gone, "failed", "location-not-found"))
    unknown = image_intents.request_fetch(host.db, ROOT_CALLER, "A" * 27)
    host.run(_ending(host, unknown, "failed", "reference-unknown"))

    assert host.leftovers() == []


def test_cancelled_fetch_leaves_nothing(host: Host) -> None:
    """Cancelling in the middle of a download ends the operation and removes every trace."""
    host.publish()
    held = Fault(cut_after_bytes=100_000, hold=threading.Event())
    host.resource.faults.append(held)
    operation = image_intents.request_fetch(host.db, ROOT_CALLER, IDENTIFIER)

    async def script(operations: Operations) -> None:
        await host.sent(held)
        operation_intents.request_cancel(host.db, ROOT_CALLER, operation.id)
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
    first = image_intents.request_fetch(host.db, ROOT_CALLER, IDENTIFIER)
    second = image_intents.request_fetch(host.db, ROOT_CALLER, IDENTIFIER)

    async def script(operations: Operations) -> None:
        assert host.acquisition is not None
        while host.acquisition.statistics().get(IDENTIFIER) != 2:
            await trio.lowlevel.checkpoint()
        await host.sent(held)
        operation_intents.request_cancel(host.db, ROOT_CALLER, first.id)
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
    operation = image_intents.request_fetch(host.db, ROOT_CALLER, IDENTIFIER)

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
    operation = launch_intents.request_launch(host.db, ROOT_CALLER, request)

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
    host.run(_ending(host, image_intents.request_fetch(host.db, ROOT_CALLER, IDENTIFIER), "done"))
    names = ["vm1", "vm2", "vm3"]
    launches = [
        launch_intents.request_launch(
            host.db, ROOT_CALLER,
            LaunchRequest(IDENTIFIER, name, size_bytes=512 if name == "vm2" else None),
        )
        for name in names
    ]  # fmt: skip
    clone = disk_intents.create_disk(host.db, ROOT_CALLER, DiskRequest(reference=IDENTIFIER))
    absent = launch_intents.request_launch(
        host.db, ROOT_CALLER, LaunchRequest("local:absent", "vm4")
    )

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
