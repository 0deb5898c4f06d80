"""Images that their catalogue takes back, or that are not proven yet: what may be made of them."""

import shutil
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import trio
import trio.testing
from support.documents import EMAIL, make_endorser, shelve, signed_document, unsigned_document
from support.lazy import manifest_of
from support.operation_host import IDENTIFIER, IMAGE, NOW, ROOT_CALLER, Host, operation_host

from stratocache.cache.catalogue import Standing
from stratocache.cache.configuration import CatalogueSettings, RecheckSettings
from stratocache.fs import disk_intents, image_intents, inventory, launch_intents, withdrawal
from stratocache.fs.manifests import published_manifests
from stratocache.fs.operations import Operations
from stratocache.fs.records import DiskRequest, LaunchRequest, Operation
from stratocache.fs.state import now

OFTEN = RecheckSettings(interval_s=0.05, confirm_s=0.2, pause_s=0.01)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """A host that asks its catalogue often; the catalogue is a folder with one image."""
    with operation_host(tmp_path) as host:
        _configure(host, recheck=OFTEN)
        host.publish()
        yield host


def _configure(host: Host, **changes: object) -> None:
    host.configuration = host.configuration.model_copy(update=changes)


def _entries(host: Host) -> Path:
    return host.folder / "entries"


def _deprecate(host: Host) -> None:
    unsigned = unsigned_document(IMAGE, deprecated="holes everywhere")
    document = signed_document(make_endorser(), unsigned, created=NOW)
    shelve(_entries(host), document, IDENTIFIER, EMAIL, NOW)


def _unlist(host: Host) -> None:
    shutil.rmtree(_entries(host))
    _entries(host).mkdir()


def _run(host: Host, script: Callable[[Operations], object]) -> None:
    """Run a script beside operations and the recheck."""

    async def both(operations: Operations) -> None:
        assert host.recheck is not None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(host.recheck.run)
            await script(operations)  # type: ignore[misc]
            nursery.cancel_scope.cancel()

    host.run(both)


def _state(host: Host) -> str:
    return inventory.image(host.db, IDENTIFIER).state


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 -- it is in a database
        await trio.sleep(0.01)


async def _become(host: Host, state: str) -> None:
    await _until(lambda: _state(host) == state)


async def _fetched(host: Host, operations: Operations) -> Operation:
    fetch = image_intents.request_fetch(host.db, ROOT_CALLER, IDENTIFIER)
    await operations.look()
    return await host.end(fetch)


async def _refused(host: Host, operations: Operations) -> None:
    """Check that neither a launch nor a clone is made now."""
    launch = launch_intents.request_launch(host.db, ROOT_CALLER, LaunchRequest(IDENTIFIER, "late"))
    clone = disk_intents.create_disk(host.db, ROOT_CALLER, DiskRequest(reference=IDENTIFIER))
    await operations.look()
    for operation in (launch, clone):
        await _until(lambda: inventory.operation(host.db, operation.id).error is not None)  # noqa: B023
        error = inventory.operation(host.db, operation.id).error
        assert error is not None
        assert (error["category"], error["code"]) == ("Refused", "image-withdrawn")
    host.db.connection.execute("DELETE FROM launches")


def _events(host: Host, kind: str) -> list[str]:
    rows = host.db.rows("SELECT message FROM events WHERE kind = ? ORDER BY number", kind)
    return [row["message"] for row in rows]


async def _cloned(host: Host, operations: Operations) -> str:
    clone = disk_intents.create_disk(host.db, ROOT_CALLER, DiskRequest(reference=IDENTIFIER))
    await operations.look()
    await _until(lambda: inventory.find_disk(host.db, clone.subject) is not None)
    return clone.subject


def test_a_deprecated_image_is_withdrawn(host: Host) -> None:
    """What its endorser takes back in writing makes no new disk; disks of it are named and go on."""

    async def script(operations: Operations) -> None:
        assert (await _fetched(host, operations)).state == "done"
        uuid = await _cloned(host, operations)
        _deprecate(host)
        await _become(host, "withdrawn")
        [message] = _events(host, "image.withdrawn")
        assert "holes everywhere" in message and uuid in message
        await _refused(host, operations)
        assert inventory.disk(host.db, ROOT_CALLER, uuid).base_image == IDENTIFIER
        assert IDENTIFIER in published_manifests(host.db)
        reader = await host.images.open_reader(IDENTIFIER)
        assert bytes(await reader.read(0, len(IMAGE))) == IMAGE

    _run(host, script)
    image = inventory.image(host.db, IDENTIFIER)
    assert image.withdrawn_at is not None
    assert "holes everywhere" in (image.withdrawn_because or "")


def test_absence_counts_when_it_lasts(host: Host) -> None:
    """An image that its catalogue does not list any more stays until that has been so for a while."""
    _configure(host, recheck=RecheckSettings(interval_s=0.05, confirm_s=3600, pause_s=0.01))

    async def absent(operations: Operations) -> None:
        assert (await _fetched(host, operations)).state == "done"
        _unlist(host)
        await _until(lambda: inventory.image(host.db, IDENTIFIER).unlisted_since is not None)
        first = inventory.image(host.db, IDENTIFIER).checked_at
        assert host.recheck is not None
        host.recheck.note(IDENTIFIER)  # asked again before the time is over
        await _until(lambda: inventory.image(host.db, IDENTIFIER).checked_at != first)
        assert _state(host) == "verified"

    _run(host, absent)
    _configure(host, recheck=OFTEN)

    async def lasting(operations: Operations) -> None:
        await _become(host, "withdrawn")

    _run(host, lasting)
    assert "does not list it" in _events(host, "image.withdrawn")[0]


def test_one_absence_is_forgotten(host: Host) -> None:
    """A flaw of a moment leaves no trace once the catalogue lists the image again."""
    _configure(host, recheck=RecheckSettings(interval_s=0.05, confirm_s=0.5, pause_s=0.01))

    async def script(operations: Operations) -> None:
        assert (await _fetched(host, operations)).state == "done"
        image = inventory.image(host.db, IDENTIFIER)
        withdrawal.record(host.db, image, Standing("unlisted"), confirm_s=0.5)
        assert inventory.image(host.db, IDENTIFIER).unlisted_since is not None
        await _until(lambda: inventory.image(host.db, IDENTIFIER).unlisted_since is None)

    _run(host, script)
    assert _events(host, "image.withdrawn") == []


def test_an_unreachable_catalogue_withdraws_nothing(host: Host) -> None:
    """A catalogue that fails is left alone, and its images stay what they are."""

    async def script(operations: Operations) -> None:
        assert (await _fetched(host, operations)).state == "done"
        _entries(host).rename(host.folder / "away")
        recheck = host.recheck
        assert recheck is not None
        recheck.note(IDENTIFIER)
        await _until(lambda: bool(recheck.resting()))
        image = inventory.image(host.db, IDENTIFIER)
        assert (image.state, image.unlisted_since) == ("verified", None)
        assert (await _fetched(host, operations)).state == "done"
        (host.folder / "away").rename(_entries(host))
        await _until(lambda: not recheck.resting())
        assert _state(host) == "verified"

    _run(host, script)
    assert _events(host, "image.withdrawn") == []


def test_a_withdrawn_image_that_is_listed_again_is_verified(host: Host) -> None:
    """A mistake is mended by the next question, or at once by whoever fetches the image."""
    never = RecheckSettings(interval_s=86400, confirm_s=0, pause_s=0)
    moved = host.folder / "moved"

    async def script(operations: Operations) -> None:
        assert (await _fetched(host, operations)).state == "done"
        shutil.copytree(_entries(host), moved)
        _unlist(host)
        await _become(host, "withdrawn")
        shutil.rmtree(_entries(host))
        moved.rename(_entries(host))
        await _become(host, "verified")
        await _cloned(host, operations)

    _run(host, script)
    assert len(_events(host, "image.reinstated")) == 1
    _configure(host, recheck=never)

    async def by_hand(operations: Operations) -> None:
        image = inventory.image(host.db, IDENTIFIER)
        withdrawal.record(host.db, image, Standing("taken-back", reason="no"), confirm_s=0)
        await _refused(host, operations)
        _deprecate(host)
        ended = await _fetched(host, operations)
        assert ended.error is not None and ended.error["code"] == "image-withdrawn"
        shutil.rmtree(_entries(host))
        ended = await _fetched(host, operations)
        assert ended.error is not None and ended.error["code"] == "image-withdrawn"
        _entries(host).mkdir()
        host.publish()
        assert (await _fetched(host, operations)).state == "done"
        assert _state(host) == "verified"

    _run(host, by_hand)


def test_a_new_endorsement_is_kept(host: Host) -> None:
    """The entry of an image becomes the newest of its endorser, so that it can outlive the first."""

    async def script(operations: Operations) -> None:
        assert (await _fetched(host, operations)).state == "done"
        unsigned = unsigned_document(IMAGE, valid_until=NOW + timedelta(days=400))
        document = signed_document(make_endorser(), unsigned, created=NOW)
        shelve(_entries(host), document, IDENTIFIER, EMAIL, NOW)
        await _until(lambda: inventory.image(host.db, IDENTIFIER).entry.endorsed_at == NOW)

    _run(host, script)
    assert _state(host) == "verified"
    assert _events(host, "image.reinstated") == []


# Images that nothing proves before they are whole.


def _launch(host: Host, instance: str, *, provisional: bool) -> Operation:
    request = LaunchRequest(IDENTIFIER, instance, provisional=provisional)
    return launch_intents.request_launch(host.db, ROOT_CALLER, request)


def _recorded(host: Host, instance: str) -> bool:
    return inventory.launch(host.db, instance).boot_disk is not None


def _allow(host: Host) -> None:
    catalogue = host.configuration.catalogues["stratuslab"]
    allowed = CatalogueSettings.model_validate(
        {**catalogue.model_dump(), "endorsers": {EMAIL: {"provisional": "allow"}}}
    )
    _configure(host, catalogues={"stratuslab": allowed})


def test_unproven_bytes_are_refused_by_default(host: Host) -> None:
    """A launch that asks for them fails before anything is fetched; one that does not is made."""
    launch = _launch(host, "eager", provisional=True)

    async def script(operations: Operations) -> None:
        await _until(lambda: inventory.operation(host.db, launch.id).error is not None)
        error = inventory.operation(host.db, launch.id).error
        assert error is not None
        assert (error["category"], error["code"]) == ("Refused", "provisional-refused")
        assert host.origin.log == []
        _launch(host, "patient", provisional=False)
        await operations.look()
        await _until(lambda: _recorded(host, "patient"))
        assert _state(host) == "verified"
        _launch(host, "late", provisional=True)  # by now there is nothing to be refused
        await operations.look()
        await _until(lambda: _recorded(host, "late"))

    _run(host, script)


def test_only_who_asks_gets_unproven_bytes(host: Host) -> None:
    """Of an image on its way that nothing proves a launch is made at once if it says so and its
    endorser may be trusted; others wait until the image is verified."""
    _allow(host)
    host.resource.hold(after=0)

    async def script(operations: Operations) -> None:
        assert host.catalogues is not None
        entry = await host.catalogues.resolve(IDENTIFIER, now=NOW)
        host.images.publish(IDENTIFIER, manifest_of(IMAGE))
        host.db.connection.execute(
            "INSERT INTO images (id, state, size_bytes, entry, created_at) "
            "VALUES (?, 'provisional', ?, ?, ?)",
            (IDENTIFIER, len(IMAGE), entry.model_dump_json(), now()),
        )
        _launch(host, "patient", provisional=False)
        _launch(host, "eager", provisional=True)
        clone = disk_intents.create_disk(host.db, ROOT_CALLER, DiskRequest(reference=IDENTIFIER))
        await operations.look()
        await _until(lambda: _recorded(host, "eager"))
        await trio.testing.wait_all_tasks_blocked()
        assert not _recorded(host, "patient")
        assert inventory.find_disk(host.db, clone.subject) is None
        host.resource.let_go()
        await _until(lambda: _recorded(host, "patient"))
        assert _state(host) == "verified"
        await _until(lambda: inventory.find_disk(host.db, clone.subject) is not None)

    _run(host, script)
