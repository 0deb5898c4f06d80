"""What fetching cost and what the cache saved: hits, waits per boot, savings, predictions."""

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from support.lazy import index_of, manifest_of
from support.operation_host import IDENTIFIER, IMAGE, ROOT_CALLER, Host, operation_host

from stratocache.cache.chunks import CHUNK_BYTES, ChunkStore
from stratocache.cache.image_reader import ImageReader
from stratocache.cache.images import ImageStore
from stratocache.cache.manifest import Manifest
from stratocache.cache.traffic import Traffic, reading_for
from stratocache.fs import fetch_account, image_intents, inventory, traffic_record
from stratocache.fs.disk_intents import create_disk
from stratocache.fs.local_map import local_map
from stratocache.fs.manifest_sizes import ManifestSizes, shared_bytes
from stratocache.fs.operations import Operations
from stratocache.fs.pace import Pace, remaining_s
from stratocache.fs.records import DiskRequest
from stratocache.fs.sharing import Sharing
from stratocache.fs.tallies import tallies
from stratocache.fs.traffic_record import TrafficRecord

CHUNKS = manifest_of(IMAGE).chunk_count


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """A host whose catalogue is a folder and whose origin serves one image."""
    with operation_host(tmp_path) as host:
        yield host


def _publish_index(host: Host) -> None:
    index = index_of(IMAGE, host.folder)
    url = host.origin.add("/image.caibx", index)
    host.publish(
        extra='<sc:index xmlns:sc="http://stratocache.org/terms#" rdf:parseType="Resource">'
        f"<sc:url>{url}</sc:url><sc:sha256>{hashlib.sha256(index).hexdigest()}</sc:sha256>"
        "</sc:index>"
    )


def _account(host: Host) -> fetch_account.ImageAccount:
    return fetch_account.of_image(host.db, inventory.image(host.db, IDENTIFIER))


def test_a_whole_fetch_counts_what_moved_and_later_ones_what_they_saved(host: Host) -> None:
    """The fetch that moved the image saved nothing; a clone and a fetch after it saved all of it."""
    host.publish()
    first = image_intents.request_fetch(host.db, ROOT_CALLER, IDENTIFIER)

    async def script(operations: Operations) -> None:
        assert (await host.end(first)).state == "done"
        await ManifestSizes(host.db, host.images).look()
        assert host.record is not None
        await host.record.write()
        assert _account(host).cache_saved_bytes == 0
        create_disk(host.db, ROOT_CALLER, DiskRequest(reference=IDENTIFIER))
        again = image_intents.request_fetch(host.db, ROOT_CALLER, IDENTIFIER)
        await operations.look()
        assert (await host.end(again)).state == "done"

    host.run(script)

    account = _account(host)
    [disk] = inventory.disks(host.db, ROOT_CALLER)
    assert (account.remote_bytes, account.stored_bytes) == (len(IMAGE), len(IMAGE))
    assert account.cache_saved_bytes == 2 * len(IMAGE)
    assert fetch_account.of_disk(host.db, disk).cache_saved_bytes == len(IMAGE)
    total = fetch_account.of_host(host.db, len(IMAGE))
    assert (total.cache_saved_bytes, total.remote_bytes) == (2 * len(IMAGE), len(IMAGE))
    assert (total.shared_bytes, total.hit_ratio) == (0, None)


def test_reads_are_hits_or_misses_by_what_they_found(host: Host) -> None:
    """Of a lazy image the first read of each chunk is a miss unless it came before, all others are
    hits; readers' bytes are what they got."""
    _publish_index(host)
    host.resource.hold(after=1)
    image_intents.request_fetch(host.db, ROOT_CALLER, IDENTIFIER)

    async def read(reader: ImageReader) -> None:
        with reading_for("1"):
            for offset in (*range(0, len(IMAGE), CHUNK_BYTES), 0, CHUNK_BYTES - 10):
                await reader.read(offset, 20)

    async def script(_: Operations) -> None:
        assert host.record is not None
        while not inventory.images(host.db) or not inventory.images(host.db)[0].size_bytes:  # noqa: ASYNC110 -- it is in a database
            await trio.sleep(0.01)
        reader = host.images.reader(IDENTIFIER)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, reader)
            await trio.testing.wait_all_tasks_blocked(0.05)
            host.resource.let_go()
        counts = reader.counts
        assert counts.hits + counts.misses == CHUNKS + 3  # the last read is of two chunks
        assert counts.hit_bytes + counts.miss_bytes == (CHUNKS + 2) * 20
        assert counts.hits >= 4 and counts.misses >= 1
        await host.record.write()

    host.run(script)

    account = _account(host)
    assert account.hits + account.misses == CHUNKS + 3
    assert account.hit_ratio == round(account.hits / (CHUNKS + 3), 4)
    assert account.remote_wait_s > 0 and account.traffic_history
    assert sum(sample.remote_bytes for sample in account.traffic_history) == account.remote_bytes
    kept = tallies(host.db)
    assert sum(kept["chunks"].values()) == CHUNKS and kept["requests"]["ok"] >= 1
    assert (kept["hits"][""], kept["misses"][""]) == (account.hits, account.misses)


def test_failed_requests_are_counted_by_their_kind(host: Host) -> None:
    """An origin that lacks the file is asked in vain; that is in the account of requests."""
    _publish_index(host)
    image_intents.request_fetch(host.db, ROOT_CALLER, IDENTIFIER)
    del host.origin.resources["/image"]

    async def script(operations: Operations) -> None:
        [fetch] = inventory.operations(host.db)
        await host.end(fetch)
        assert host.record is not None
        await host.record.write()

    host.run(script)

    requests = tallies(host.db)["requests"]
    assert "ok" not in requests and sum(requests.values()) >= 1


def test_each_boot_of_a_disk_has_its_own_account(host: Host) -> None:
    """What a disk waited begins anew with its next attachment; what it waited in all goes on. Time
    that nothing came leaves no trace, and the history is bounded."""
    create_disk(host.db, ROOT_CALLER, DiskRequest(size_bytes=4096))
    [disk] = inventory.disks(host.db, ROOT_CALLER)
    host.db.connection.execute("UPDATE disks SET epoch = 1")
    traffic = Traffic()
    now = 1_700_000_003.0

    async def boots() -> None:
        nonlocal now
        record = TrafficRecord(host.db, traffic, {}, clock=lambda: now)
        for wait_s in (1.0, 2.0):
            traffic.waited("no-image", str(disk.number), wait_s)
            traffic.asked(str(disk.number), 100)
            await record.write()
        account = fetch_account.of_disk(host.db, inventory.disks(host.db, ROOT_CALLER)[0])
        assert (account.boot_remote_wait_s, account.boot_remote_bytes) == (3.0, 200)
        assert [sample.remote_wait_s for sample in account.traffic_history] == [3.0]
        host.db.connection.execute("UPDATE disks SET epoch = 2")
        again = fetch_account.of_disk(host.db, inventory.disks(host.db, ROOT_CALLER)[0])
        assert (again.boot_remote_wait_s, again.remote_wait_s) == (0, 3.0)
        for _ in range(70):
            now += 10
            traffic.waited("no-image", str(disk.number), 0.5)
            await record.write()
            await record.write()

    trio.run(boots)

    account = fetch_account.of_disk(host.db, inventory.disks(host.db, ROOT_CALLER)[0])
    assert (account.boot_remote_wait_s, account.boot_remote_bytes) == (35.0, 0)
    assert (account.remote_wait_s, account.remote_bytes) == (38.0, 200)
    assert len(account.traffic_history) == traffic_record.HISTORY_MAX
    assert account.traffic_history[-1].at == "2023-11-14T22:25:00.000000Z"
    assert {sample.remote_wait_s for sample in account.traffic_history} == {0.5}


def test_the_rate_follows_what_happens() -> None:
    """A steady rate is found at once; a stall makes the prediction longer, then unknown."""
    pace = Pace(0.0)
    for second in range(1, 31):
        pace.done_bytes = second * 1_000_000
        assert pace.measure(second) == pytest.approx(1_000_000)
    assert remaining_s(5_000_000, pace.rate_bytes_s) == 5.0
    predicted = [remaining_s(5_000_000, pace.measure(second)) for second in range(31, 300)]
    known = [seconds for seconds in predicted if seconds is not None]
    assert known == sorted(known) and known[0] > 5 and predicted[-1] is None
    pace.done_bytes += 40_000_000
    assert pace.measure(301) > 3_000_000
    assert remaining_s(0, 0.0) == 0.0


@given(st.lists(st.tuples(st.floats(0, 100) | st.just(1e-300), st.integers(0, 2**40)), max_size=30))
def test_rates_are_never_negative(steps: list[tuple[float, int]]) -> None:
    """Whatever progress says, also when it falls back, there is a rate and no error."""
    pace, at_s = Pace(0.0), 0.0
    for elapsed_s, done_bytes in steps:
        at_s, pace.done_bytes = at_s + elapsed_s, done_bytes
        assert 0 <= pace.measure(at_s) < float("inf")


def _store(state: Path, images: dict[str, list[bytes]]) -> ImageStore:
    """Publish images made of chunks."""
    store = ImageStore(state, ChunkStore(state / "chunks"))
    for name, chunks in images.items():
        digests = b"".join(hashlib.sha256(chunk).digest() for chunk in chunks)
        store.publish(name, Manifest(sum(map(len, chunks)), digests))
    return store


def test_shared_space_is_what_others_have_too(tmp_path: Path) -> None:
    """Chunks that two images name count for both, zeros and repetitions within one for none; what
    is remembered ends with any change."""
    chance = random.Random(1)
    a, b, c = (chance.randbytes(CHUNK_BYTES) for _ in range(3))
    zero, tail = bytes(CHUNK_BYTES), b"tail"
    store = _store(tmp_path, {"one": [a, a, zero, b, tail], "two": [b, c], "three": [zero, c]})
    sharing = Sharing(tmp_path)

    assert store.manifest("one").stored_bytes() == 2 * CHUNK_BYTES + len(tail)
    assert [sharing.shared_bytes(name) for name in ("one", "two", "three", "four")] == [
        CHUNK_BYTES, 2 * CHUNK_BYTES, CHUNK_BYTES, None
    ]  # fmt: skip
    store.remove("three")
    assert sharing.shared_bytes("two") == CHUNK_BYTES
    (tmp_path / "manifests" / "one.caibx").write_bytes(b"rotten")
    assert sharing.shared_bytes("two") is None
    store.chunks.close()


def test_sizes_of_manifests_are_known_once_and_go_with_their_images(host: Host) -> None:
    """Each image's is read when it is new; what all would take beyond the chunks is shared."""
    host.publish()
    fetch = image_intents.request_fetch(host.db, ROOT_CALLER, IDENTIFIER)

    async def script(_: Operations) -> None:
        await host.end(fetch)
        sizes = ManifestSizes(host.db, host.images)
        await sizes.look()
        await sizes.look()

    host.run(script)

    rows = [tuple(row) for row in host.db.rows("SELECT * FROM manifest_sizes")]
    assert rows == [(IDENTIFIER, len(IMAGE))]
    assert shared_bytes(host.db, len(IMAGE) // 2) == len(IMAGE) - len(IMAGE) // 2
    assert shared_bytes(host.db, 2 * len(IMAGE)) == 0
    host.db.connection.execute("DELETE FROM images")
    assert host.db.rows("SELECT * FROM manifest_sizes") == []


def test_the_map_shows_which_part_is_here(host: Host) -> None:
    """Of a complete image all, of one that is coming the chunks that have a file."""
    host.publish()
    fetch = image_intents.request_fetch(host.db, ROOT_CALLER, IDENTIFIER)

    async def script(_: Operations) -> None:
        await host.end(fetch)

    host.run(script)
    state_dir = host.configuration.state_dir
    image = inventory.image(host.db, IDENTIFIER)
    assert local_map(state_dir, image, 7) == [1.0] * 7
    host.db.connection.execute("UPDATE images SET state = 'provisional'")
    image = inventory.image(host.db, IDENTIFIER)
    manifest = host.images.manifest(IDENTIFIER)
    for index in (0, 1, 9):
        host.images.chunks.path(manifest.digest(index)).unlink()
    assert local_map(state_dir, image, 5) == [0.0, 1.0, 1.0, 1.0, 0.5]
    assert local_map(state_dir, image, 1) == [0.7]
    assert len(local_map(state_dir, image, 40)) == 40
    assert json.dumps(local_map(state_dir, image, 256))
