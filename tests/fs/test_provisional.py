"""Images that are served before they are complete: landing, completion, rejection, recovery."""

import gzip
import hashlib
import os
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
from support.contents import qcow2_of
from support.lazy import index_of, manifest_of
from support.operation_host import IDENTIFIER, IMAGE, ROOT_CALLER, Host, operation_host
from support.origins import Fault

from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.cache.errors import Conflict, NotFound, NotVerified, Refused
from stratocache.cache.repair import Repairer
from stratocache.cache.scrub import Scrub, Tally
from stratocache.fs import (
    attachment_intents,
    cache_check,
    fetch_account,
    image_intents,
    inventory,
    launch_intents,
    operation_intents,
)
from stratocache.fs.keep_plan import eviction_plan
from stratocache.fs.losses import RepairRecord
from stratocache.fs.manifests import incomplete_manifests, published_manifests
from stratocache.fs.offline_plan import weaknesses
from stratocache.fs.operations import Operations
from stratocache.fs.records import LaunchRequest, Operation
from stratocache.fs.schema import MIGRATIONS
from stratocache.fs.state import Database
from stratocache.fs.verification import Verification, request_verification

CHUNKS = manifest_of(IMAGE).chunk_count


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """A host whose catalogue is a folder and whose origin serves one image."""
    with operation_host(tmp_path) as host:
        yield host


def _publish(host: Host, *, sha256: str | None = None, **fields: object) -> None:
    """Offer the image with an index of it, or one whose signed digest is `sha256`."""
    index = index_of(IMAGE, host.folder)
    url = host.origin.add("/image.caibx", index)
    endorsed = sha256 or hashlib.sha256(index).hexdigest()
    host.publish(extra=_index_element(url, endorsed), **fields)


def _index_element(url: str, sha256: str) -> str:
    return (
        '<sc:index xmlns:sc="http://stratocache.org/terms#" rdf:parseType="Resource">'
        f"<sc:url>{url}</sc:url><sc:sha256>{sha256}</sc:sha256></sc:index>"
    )


def _asked(host: Host) -> Counter[int]:
    """Return how often each chunk left the raw location."""
    asked: Counter[int] = Counter()
    for request in host.origin.log:
        if request.path == "/image" and request.status == 206 and request.range:
            start, end = (int(text) for text in request.range.removeprefix("bytes=").split("-"))
            asked.update(range(start // CHUNK_BYTES, end // CHUNK_BYTES + 1))
    return asked


def _events(host: Host) -> list[str]:
    return [row["kind"] for row in host.db.rows("SELECT kind FROM events ORDER BY number")]


async def _until(condition: Callable[[], bool]) -> None:
    """Wait until something is so."""
    while not condition():  # noqa: ASYNC110 -- it is in a database
        await trio.sleep(0.01)


async def _state(host: Host, state: str) -> None:
    """Wait until the image is in a state."""

    def reached() -> bool:
        image = inventory.find_image(host.db, IDENTIFIER)
        return image is not None and image.state == state

    await _until(reached)


def _launch(host: Host, instance: str = "vm1") -> Operation:
    return launch_intents.request_launch(host.db, ROOT_CALLER, LaunchRequest(IDENTIFIER, instance))


def _launched(host: Host, instance: str = "vm1") -> bool:
    return inventory.launch(host.db, instance).boot_disk is not None


async def _recorded(host: Host, instance: str = "vm1") -> None:
    """Wait until a launch has its clone's row."""
    await _until(lambda: _launched(host, instance))


def test_a_launch_does_not_wait_for_the_image(host: Host) -> None:
    """With an endorsed index the clone is there after one chunk; the rest follows as a fetch."""
    _publish(host)
    host.resource.hold(after=1)
    _launch(host)

    async def script(operations: Operations) -> None:
        await _recorded(host)
        image = inventory.image(host.db, IDENTIFIER)
        assert (image.state, image.size_bytes, image.sha256) == ("provisional", len(IMAGE), None)
        await operations.look()
        [fetch] = [item for item in inventory.operations(host.db) if item.kind == "fetch"]
        assert fetch.state in ("pending", "running")
        host.resource.let_go()
        ended = await host.end(fetch)
        assert (ended.state, ended.result) == ("done", {"image": IDENTIFIER})

    host.run(script)

    image = inventory.image(host.db, IDENTIFIER)
    assert (image.state, image.sha256) == ("verified", hashlib.sha256(IMAGE).hexdigest())
    assert _asked(host) == Counter(range(CHUNKS))
    assert host.images.reader(IDENTIFIER).read_blocking(0, len(IMAGE)) == IMAGE
    assert _events(host).count("image.provisional") == 1


def test_a_fetch_waits_for_the_whole(host: Host) -> None:
    """`image fetch` ends with a verified image, and adds no operation beside itself."""
    _publish(host)
    fetch = image_intents.request_fetch(host.db, ROOT_CALLER, IDENTIFIER)

    async def script(operations: Operations) -> None:
        assert (await host.end(fetch)).state == "done"
        assert host.record is not None
        await host.record.write()

    host.run(script)

    image = inventory.image(host.db, IDENTIFIER)
    assert image.state == "verified"
    assert [item.id for item in inventory.operations(host.db)] == [fetch.id]
    account = fetch_account.of_image(host.db, image)
    assert (account.remote_bytes, account.local_bytes) == (len(IMAGE), len(IMAGE))
    assert account.complete_in_s == 0


@pytest.mark.parametrize("fault", ["digest", "absent", "other-image"])
def test_an_index_that_is_no_use_costs_nothing_but_time(host: Host, fault: str) -> None:
    """With a forged or missing index, or another image's, the image is fetched whole."""
    _publish(host, sha256="0" * 64 if fault == "digest" else None)
    if fault == "absent":
        del host.origin.resources["/image.caibx"]
    if fault == "other-image":
        other = bytes(len(IMAGE) - 1) + b"!"
        index = index_of(other, host.folder)
        _publish(host, sha256=hashlib.sha256(index).hexdigest())
        host.origin.add("/image.caibx", index)
    _launch(host)

    async def script(operations: Operations) -> None:
        await _recorded(host)

    host.run(script)

    assert inventory.image(host.db, IDENTIFIER).state == "verified"
    assert "image.index-unusable" in _events(host)
    assert host.images.reader(IDENTIFIER).read_blocking(0, len(IMAGE)) == IMAGE


def _stream(host: Host, held: Fault | None = None) -> bytes:
    """Offer the image compressed, without a chunk store; return what is served."""
    packed = gzip.compress(IMAGE, 1)
    host.resource.data = packed
    if held is not None:
        host.resource.faults.append(held)
    _publish(host, compression="gz")
    return packed


def test_a_compressed_image_is_launched_while_it_flows(host: Host) -> None:
    """With an index the first chunk that has passed is enough; the source leaves its origin once."""
    held = Fault(cut_after_bytes=len(IMAGE) // 2, hold=threading.Event())
    packed = _stream(host, held)
    _launch(host)

    async def script(operations: Operations) -> None:
        await _recorded(host)
        assert inventory.image(host.db, IDENTIFIER).state == "provisional"
        assert await host.images.reader(IDENTIFIER).read(0, 4096) == IMAGE[:4096]
        assert held.hold is not None
        held.hold.set()
        await _state(host, "verified")

    host.run(script)

    assert host.origin.sent_bytes("/image") == len(packed)
    assert host.images.reader(IDENTIFIER).read_blocking(0, len(IMAGE)) == IMAGE
    assert os.listdir(host.configuration.state_dir / "stage") == []


def test_a_stream_survives_a_death(host: Host) -> None:
    """The next process asks for the rest of the source only, and the launch stands."""
    held = Fault(cut_after_bytes=len(IMAGE) // 2, hold=threading.Event())
    packed = _stream(host, held)
    _launch(host)

    async def die(operations: Operations) -> None:
        await _recorded(host)

    host.run(die)
    assert held.hold is not None
    held.hold.set()
    assert cache_check.check(host.configuration).leaks == []
    kept_bytes = (
        (host.configuration.state_dir / "stage" / IDENTIFIER / "source.part").stat().st_size
    )
    host.origin.log.clear()
    host.images = type(host.images)(host.configuration.state_dir, host.chunks)

    async def go_on(operations: Operations) -> None:
        await _state(host, "verified")

    host.run(go_on)

    assert 0 < kept_bytes < len(packed)
    assert host.origin.sent_bytes("/image") == len(packed) - kept_bytes


def test_a_stream_that_nobody_wants_any_more_leaves_nothing(host: Host) -> None:
    """Deleting an image in the middle of its stream ends the download and removes what came."""
    held = Fault(cut_after_bytes=len(IMAGE) // 2, hold=threading.Event())
    _stream(host, held)
    fetch = image_intents.request_fetch(host.db, ROOT_CALLER, IDENTIFIER)

    async def script(operations: Operations) -> None:
        await _state(host, "provisional")
        operation_intents.request_cancel(host.db, ROOT_CALLER, fetch.id)
        await operations.look()
        await _state(host, "deleting")
        assert host.provisional is not None and held.hold is not None
        await host.provisional.stop(IDENTIFIER)
        held.hold.set()
        await trio.to_thread.run_sync(host.images.remove, IDENTIFIER)
        assert host.leftovers() == []

    host.run(script)


def test_a_qcow2_image_is_launched_by_ranges_of_its_file(host: Host) -> None:
    """With an index of its disk the clone is there after the tables and one chunk; all is proven."""
    raw = host.folder / "raw"
    raw.write_bytes(IMAGE[: len(IMAGE) // 512 * 512])
    image = raw.read_bytes()
    packed = qcow2_of(raw, host.folder / "qcow2").read_bytes()
    host.resource.data = packed
    host.resource.hold(after=5)
    index = index_of(image, host.folder)
    url = host.origin.add("/image.caibx", index)
    identifier = host.publish(
        packed, image_format="qcow2", extra=_index_element(url, hashlib.sha256(index).hexdigest())
    )
    launch_intents.request_launch(host.db, ROOT_CALLER, LaunchRequest(identifier, "vm1"))

    async def script(operations: Operations) -> None:
        await _recorded(host)
        found = inventory.image(host.db, identifier)
        assert (found.state, found.size_bytes) == ("provisional", len(image))
        host.resource.let_go()
        await _until(lambda: inventory.image(host.db, identifier).state == "verified")

    host.run(script)

    assert inventory.image(host.db, identifier).sha256 == hashlib.sha256(image).hexdigest()
    assert host.images.reader(identifier).read_blocking(0, len(image)) == image


def _allow(host: Host) -> None:
    """Let images be launched before anything of them is proven."""
    [catalogue] = host.configuration.catalogues.values()
    allowing = catalogue.model_copy(update={"provisional": "allow"})
    changes = {"catalogues": {"stratuslab": allowing}}
    host.configuration = host.configuration.model_copy(update=changes)


def _launch_unproven(host: Host) -> Operation:
    request = LaunchRequest(IDENTIFIER, "vm1", provisional=True)
    return launch_intents.request_launch(host.db, ROOT_CALLER, request)


@pytest.mark.parametrize("compression", ["none", "gz"])
def test_an_image_without_an_index_is_served_as_it_flows(host: Host, compression: str) -> None:
    """Where that is allowed, a clone reads what has come, waits for the rest, and all is proven."""
    _allow(host)
    packed = IMAGE if compression == "none" else gzip.compress(IMAGE, 1)
    host.resource.data = packed
    held = Fault(cut_after_bytes=len(packed) // 2, hold=threading.Event())
    host.resource.faults.append(held)
    host.publish(compression=compression)
    _launch_unproven(host)

    async def script(operations: Operations) -> None:
        await _recorded(host)
        assert inventory.image(host.db, IDENTIFIER).state == "provisional"
        reader = host.images.reader(IDENTIFIER)
        assert await reader.read(100, 4096) == IMAGE[100:4196]
        assert cache_check.check(host.configuration).faults == []
        late: list[bytes | bytearray] = []

        async def wait(offset: int) -> None:
            late.append(await reader.read(offset, 4096))

        def block() -> None:
            late.append(reader.read_blocking(8 * CHUNK_BYTES, 4096))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait, 8 * CHUNK_BYTES)
            nursery.start_soon(wait, 8 * CHUNK_BYTES)
            nursery.start_soon(trio.to_thread.run_sync, block)
            assert await reader.read(CHUNK_BYTES - 9, 18) == IMAGE[CHUNK_BYTES - 9 :][:18]
            assert late == []
            assert held.hold is not None
            held.hold.set()
        assert late == [IMAGE[8 * CHUNK_BYTES :][:4096]] * 3
        await _state(host, "verified")
        assert await reader.read(0, len(IMAGE)) == IMAGE
        await _until(lambda: os.listdir(host.configuration.state_dir / "stage") == [])

    host.run(script)

    assert host.origin.sent_bytes("/image") == len(packed)
    assert host.images.reader(IDENTIFIER).manifest == manifest_of(IMAGE)


def test_an_image_that_was_served_unproven_and_is_wrong_is_rejected(host: Host) -> None:
    """When the whole digest disagrees, what was served goes to quarantine and the disk is fenced."""
    _allow(host)
    host.publish(digests={"SHA-512": "1" * 128})
    host.resource.faults.append(Fault(cut_after_bytes=len(IMAGE) // 2))
    _launch_unproven(host)

    async def script(operations: Operations) -> None:
        await _recorded(host)
        await _state(host, "rejected")
        quarantine = host.configuration.state_dir / "quarantine"
        await _until(lambda: quarantine.exists() and len(os.listdir(quarantine)) == CHUNKS)
        with pytest.raises(NotVerified) as refused:
            await host.images.reader(IDENTIFIER).read(0, 1)
        assert refused.value.code == "image-rejected"

    host.run(script)

    [disk] = inventory.disks(host.db, ROOT_CALLER)
    assert inventory.is_fenced(host.db, disk)
    assert list(_chunk_files(host)) == []


@pytest.mark.parametrize("change", ["none", "image"])
def test_what_was_served_unproven_stays_what_it_was(host: Host, change: str) -> None:
    """After a death the chunks that guests saw are read again; another image is never proven."""
    _allow(host)
    held = Fault(cut_after_bytes=len(IMAGE) // 2, hold=threading.Event())
    first = IMAGE if change == "none" else bytes(CHUNK_BYTES - 1) + b"!" + IMAGE[CHUNK_BYTES:]
    host.resource.data = first
    host.resource.faults.append(held)
    host.publish()
    _launch_unproven(host)

    async def die(operations: Operations) -> None:
        await _recorded(host)
        assert await host.images.reader(IDENTIFIER).read(0, CHUNK_BYTES) == first[:CHUNK_BYTES]

    host.run(die)
    assert held.hold is not None
    held.hold.set()
    here = set(_chunk_files(host))
    report = cache_check.check(host.configuration)
    assert report.faults == report.leaks == []
    host.resource.data, host.resource.etag = IMAGE, '"other"'
    host.images = type(host.images)(host.configuration.state_dir, host.chunks)

    async def go_on(operations: Operations) -> None:
        assert here <= set(_chunk_files(host))
        if change == "none":
            assert await host.images.reader(IDENTIFIER).read(0, 10) == IMAGE[:10]
            await _state(host, "verified")
        else:
            await _state(host, "rejected")

    host.run(go_on)

    fenced = [inventory.is_fenced(host.db, disk) for disk in inventory.disks(host.db, ROOT_CALLER)]
    assert fenced == [change == "image"]


def test_a_process_that_died_has_its_image_completed_by_the_next(host: Host) -> None:
    """What came before a death is kept: no chunk is fetched twice, and the launch stands."""
    _publish(host)
    host.resource.hold(after=2)
    _launch(host)

    async def die(operations: Operations) -> None:
        await _recorded(host)
        await _until(lambda: len(list(_chunk_files(host))) >= 2)

    host.run(die)
    before = len(list(_chunk_files(host)))
    assert before < CHUNKS
    host.resource.let_go()
    host.origin.settle()
    host.origin.log.clear()
    host.images = type(host.images)(host.configuration.state_dir, host.chunks)

    async def go_on(operations: Operations) -> None:
        await _state(host, "verified")

    host.run(go_on)

    assert sum(_asked(host).values()) == CHUNKS - before
    assert host.images.reader(IDENTIFIER).read_blocking(0, len(IMAGE)) == IMAGE


def _chunk_files(host: Host) -> Iterator[Path]:
    chunks = (host.configuration.state_dir / "chunks").rglob("*")
    return (path for path in chunks if len(path.name) == 64)


def test_a_rejected_image_fences_its_disks(host: Host) -> None:
    """When the whole is not what was promised its chunks leave, and nothing of it is attached."""
    _publish(host, digests={"SHA-512": "1" * 128})
    _launch(host)

    async def script(operations: Operations) -> None:
        await _recorded(host)
        await _state(host, "rejected")
        again = _launch(host, "vm2")
        await operations.look()
        await _until(lambda: inventory.operation(host.db, again.id).error is not None)

    host.run(script)

    [disk] = inventory.disks(host.db, ROOT_CALLER)
    assert inventory.is_fenced(host.db, disk)
    host.db.connection.execute("UPDATE disks SET state = 'available', form = 'overlay'")
    with pytest.raises(Refused) as caught:
        attachment_intents.attach(host.db, ROOT_CALLER, disk.uuid, instance="vm3", access="ro")
    assert caught.value.code == "disk-fenced"
    assert list(_chunk_files(host)) == []
    assert len(list((host.configuration.state_dir / "quarantine").iterdir())) == CHUNKS
    assert {"image.rejected", "disk.fenced"} <= set(_events(host))
    message = host.db.row("SELECT message FROM events WHERE kind = 'image.rejected'")
    assert message is not None and disk.uuid in message["message"]
    error = next(item.error for item in inventory.operations(host.db, subject="vm2"))
    assert error is not None and error["code"] == "image-rejected"

    async def read(_: Operations) -> None:
        with pytest.raises(NotVerified) as refused:
            await host.images.reader(IDENTIFIER).read(0, 1)
        assert refused.value.code == "image-rejected"

    host.run(read)


def test_a_cancelled_fetch_that_nobody_uses_leaves_nothing(host: Host) -> None:
    """An image of which nothing was made goes with the operation that wanted it."""
    _publish(host)
    host.resource.hold(after=1)
    fetch = image_intents.request_fetch(host.db, ROOT_CALLER, IDENTIFIER)

    async def script(operations: Operations) -> None:
        await _state(host, "provisional")
        operation_intents.request_cancel(host.db, ROOT_CALLER, fetch.id)
        await operations.look()
        assert (await host.end(fetch)).state == "cancelled"
        await _state(host, "deleting")
        host.resource.let_go()
        assert host.provisional is not None
        await host.provisional.stop(IDENTIFIER)
        await trio.to_thread.run_sync(host.images.remove, IDENTIFIER)
        assert host.leftovers() == []

    host.run(script)


def test_a_launch_keeps_an_image_whose_fetch_is_cancelled(host: Host) -> None:
    """A disk's image goes on being completed, whatever becomes of the operation that shows it."""
    _publish(host)
    host.resource.hold(after=1)
    _launch(host)

    async def script(operations: Operations) -> None:
        await _recorded(host)
        await operations.look()
        [fetch] = [item for item in inventory.operations(host.db) if item.kind == "fetch"]
        operation_intents.request_cancel(host.db, ROOT_CALLER, fetch.id)
        await operations.look()
        assert (await host.end(fetch)).state == "cancelled"
        host.resource.let_go()
        await _state(host, "verified")

    host.run(script)


def test_an_incomplete_image_that_a_disk_began_as_stays(host: Host) -> None:
    """It cannot be deleted, even when the disk reads a snapshot: that may lack chunks too."""
    _publish(host)
    host.resource.hold(after=1)
    _launch(host)

    async def script(operations: Operations) -> None:
        await _recorded(host)
        host.db.connection.execute("UPDATE disks SET base_manifest = 'a-snapshot'")
        with pytest.raises(Conflict) as caught:
            image_intents.request_image_deletion(host.db, ROOT_CALLER, IDENTIFIER)
        assert caught.value.code == "image-in-use"
        host.resource.let_go()

    host.run(script)


class _Nowhere:
    """No origin has anything."""

    async def restore(self, identifier: str, index: int) -> None:
        """Have nothing."""
        raise NotFound("origin-none", f"Nobody has {identifier}.")

    async def remake(self, identifier: str) -> None:
        """Have nothing."""
        raise NotFound("origin-none", f"Nobody has {identifier}.")


def test_what_has_not_come_yet_is_no_loss(host: Host) -> None:
    """Scrubber, check and plans know what is on its way, also of a snapshot that shares it."""
    _publish(host)
    host.resource.hold(after=1)
    _launch(host)

    async def script(operations: Operations) -> None:
        await _recorded(host)
        await trio.to_thread.run_sync(host.images.publish, "snapshot", manifest_of(IMAGE))
        here = len(list(_chunk_files(host)))
        assert here < CHUNKS
        assert await _scrubbed(host) == (here, 2, 0)
        assert cache_check.check(host.configuration).faults == []
        [candidate] = eviction_plan(host.configuration, host.db)
        assert candidate.kept_because == "still being fetched"
        [weakness] = weaknesses(host.configuration, host.db)
        assert (weakness.reason, weakness.missing_chunks) == (
            "it is not complete yet",
            CHUNKS - here,
        )
        host.resource.let_go()
        data = await host.images.reader("snapshot").read(0, len(IMAGE))
        assert data == IMAGE
        await _state(host, "verified")

    host.run(script)
    assert list(weaknesses(host.configuration, host.db)) == []
    assert not {"chunk.lost", "chunk.repaired"} & set(_events(host))


def test_verifying_completes_first(host: Host) -> None:
    """Who asks for an image to be verified gets one that needs no origin any more, unrepaired."""
    _publish(host)
    host.resource.hold(after=1)
    _launch(host)

    async def script(operations: Operations) -> None:
        await _recorded(host)
        operation = request_verification(host.db, ROOT_CALLER, IDENTIFIER)
        async with trio.open_nursery() as nursery:
            record = RepairRecord(host.db, lambda: None)
            repairer = Repairer(host.images, _Nowhere(), record, nursery)
            assert host.provisional is not None
            verification = Verification(host.db, host.images, repairer, host.provisional)
            nursery.start_soon(verification.perform, operation, lambda done, total: None)
            await trio.testing.wait_all_tasks_blocked()
            host.resource.let_go()
        ended = inventory.operation(host.db, operation.id)
        assert (ended.state, ended.result) == ("done", {"chunks": CHUNKS, "repaired": 0})

    host.run(script)
    assert inventory.image(host.db, IDENTIFIER).state == "verified"


async def _scrubbed(host: Host) -> tuple[int, int, int]:
    """Return how many chunks and manifests a pass looked at, and how many it missed."""
    tally = Tally()

    async def note(_: Tally) -> None:
        await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        record = RepairRecord(host.db, lambda: None)
        scrub = Scrub(
            host.images, Repairer(host.images, _Nowhere(), record, nursery), bytes_per_s=2**40,
            published=partial(published_manifests, host.db),
            incomplete=partial(incomplete_manifests, host.db), note=note,
        )  # fmt: skip
        await scrub.walk(tally)
    return tally.chunks, tally.manifests, tally.damaged


def test_a_boot_is_learned_and_fetched_first_elsewhere(host: Host) -> None:
    """What the first launch reads becomes the boot set, in the order of the reads."""
    _publish(host)
    fetch = image_intents.request_fetch(host.db, ROOT_CALLER, IDENTIFIER)
    wanted = [7, 2, 5]

    async def script(operations: Operations) -> None:
        await host.end(fetch)
        assert host.provisional is not None
        sets = host.provisional.boot_sets
        _launch(host)
        await operations.look()
        await _recorded(host)
        reader = host.images.reader(IDENTIFIER)
        await _until(lambda: reader.trace is not None)
        for index in wanted:
            await reader.read(index * CHUNK_BYTES + 5, 100)
        await sets.stop_learning(IDENTIFIER)
        assert sets.load(IDENTIFIER) == wanted

    host.run(script)


def test_the_migration_keeps_images_and_what_refers_to_them(tmp_path: Path) -> None:
    """Images of the release before stay with their numbers, attachments go on referring to them."""
    path = tmp_path / "state.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as old:
        for number, migration in enumerate(MIGRATIONS[:2], 1):
            old.executescript(f"BEGIN; {migration} PRAGMA user_version = {number}; COMMIT;")
        for name in ("gone", "kept"):
            old.execute(
                "INSERT INTO images (id, state, entry, created_at) VALUES (?, 'verified', '{}', '')",
                (name,),
            )
        old.execute("DELETE FROM images WHERE id = 'kept'")
        old.execute(
            "INSERT INTO attachments (id, image_id, instance, role, position, access, "
            "chap_username, chap_secret, state, owner, created_at) "
            "VALUES ('a', 'gone', 'vm', 'readonly', 0, 'ro', 'u', 's', 'ready', 'root', '')"
        )
    db = Database(path)

    db.migrate()

    db.connection.execute(
        "INSERT INTO images (id, state, entry, created_at) VALUES ('new', 'provisional', '{}', '')"
    )
    assert [tuple(row) for row in db.rows("SELECT number, id FROM images ORDER BY number")] == [
        (1, "gone"),
        (3, "new"),
    ]
    assert db.rows("PRAGMA foreign_key_check") == []
    with pytest.raises(sqlite3.IntegrityError):
        db.connection.execute("DELETE FROM images WHERE id = 'gone'")
    db.close()
