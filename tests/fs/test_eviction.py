"""Eviction: what goes and what stays, races with launches, and what is said when nothing can go."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
import trio
from support.crashing import Fuse, is_crash
from support.keep_daemon import ROOT, KeepDaemon, KeepHost

from stratocache.cache.catalogue import Standing
from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.cache.errors import Conflict, InvalidInput, Refused
from stratocache.fs import (
    cache_check,
    disk_intents,
    image_intents,
    inventory,
    launch_intents,
    withdrawal,
)
from stratocache.fs.eviction import request_eviction
from stratocache.fs.keep_plan import Candidate, eviction_plan
from stratocache.fs.records import Caller, DiskRequest, LaunchRequest
from stratocache.fs.scrubbing import request_scrub
from stratocache.fs.verification import request_verification

STEPS = range(0, 26, 1 if "CRASH_ROUNDS" in os.environ else 5)
"""After how many steps the process dies; `make crash` tries all."""


def _content(seed: int, chunks: int = 4) -> bytes:
    return Random(seed).randbytes(chunks * CHUNK_BYTES)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., KeepHost]]:
    """Makes hosts."""
    made: list[KeepHost] = []

    def make(**options: object) -> KeepHost:
        root = tmp_path / str(len(made))
        root.mkdir()
        made.append(KeepHost(root, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for host in made:
        host.close()


async def _fetch(daemon: KeepDaemon, identifier: str, *, pin: bool = False) -> str:
    ended = await daemon.end(image_intents.request_fetch(daemon.db, ROOT, identifier, pin=pin))
    return ended.state if ended.error is None else ended.error["code"]


async def _clone(daemon: KeepDaemon, identifier: str) -> str:
    operation = disk_intents.create_disk(daemon.db, ROOT, DiskRequest(reference=identifier))
    ended = await daemon.end(operation)
    assert ended.state == "done", ended.error
    return ended.subject


def _plan(host: KeepHost) -> dict[str, Candidate]:
    return {item.image.id: item for item in eviction_plan(host.configuration, host.db)}


def test_a_fetch_that_needs_room_takes_the_coldest(make: Callable[..., KeepHost]) -> None:
    """The image that was not used for longest goes, and no more than is needed."""
    host = make(max_bytes=13 * CHUNK_BYTES, hysteresis_ratio=0)
    first, second, third, fourth = (host.shelf.add(_content(seed)) for seed in range(4))

    async def script(daemon: KeepDaemon) -> None:
        for identifier in (first, second, third, first, fourth):
            assert await _fetch(daemon, identifier) == "done"
            assert await daemon.read_image(identifier) == host.shelf.contents[identifier]

    host.run(script)
    assert set(host.states()) == {first, third, fourth}
    assert len(host.chunk_files()) == 12
    events = host.db.rows("SELECT subject FROM events WHERE kind = 'image.evicted'")
    assert [row["subject"] for row in events] == [second]


def test_withdrawn_images_go_first_unless_they_are_held(make: Callable[..., KeepHost]) -> None:
    """Of images that nobody needs the one that nobody may use any more makes room, however lately
    it was used; one that a disk reads stays."""
    host = make(max_bytes=13 * CHUNK_BYTES, hysteresis_ratio=0)
    cold, based, taken, fresh = (host.shelf.add(_content(seed)) for seed in range(4))

    async def script(daemon: KeepDaemon) -> None:
        for identifier in (cold, based, taken):
            assert await _fetch(daemon, identifier) == "done"
        uuid = await _clone(daemon, based)
        for identifier in (based, taken):
            image = inventory.image(daemon.db, identifier)
            withdrawal.record(daemon.db, image, Standing("taken-back", reason="No."), confirm_s=0)
        plan = _plan(host)
        assert (plan[taken].order, plan[cold].order, plan[based].order) == (1, 2, None)
        assert await _fetch(daemon, fresh) == "done"
        assert await daemon.read_disk(host_number(daemon, uuid)) == host.shelf.contents[based]

    host.run(script)
    assert host.states() == {cold: "verified", based: "withdrawn", fresh: "verified"}
    [message] = host.db.rows("SELECT message FROM events WHERE kind = 'image.evicted'")
    assert f"Image {taken}, which was withdrawn, makes room" in message["message"]


def test_hysteresis_makes_room_for_the_next(make: Callable[..., KeepHost]) -> None:
    """Once begun, eviction goes on to the low mark."""
    host = make(max_bytes=12 * CHUNK_BYTES, hysteresis_ratio=0.5)
    images = [host.shelf.add(_content(seed)) for seed in range(4)]

    async def script(daemon: KeepDaemon) -> None:
        for identifier in images:
            assert await _fetch(daemon, identifier) == "done"

    host.run(script)
    assert set(host.states()) == set(images[3:])


def test_what_is_held_stays_and_is_named(make: Callable[..., KeepHost]) -> None:
    """With everything pinned, attached, or the base of a disk a fetch fails, says by what the space
    is held, leaves nothing, and evicts nothing in vain."""
    host = make(max_bytes=17 * CHUNK_BYTES, hysteresis_ratio=0)
    pinned, based, attached, cold, wanted = (
        host.shelf.add(_content(seed, 6 if seed == 4 else 4)) for seed in range(5)
    )

    async def script(daemon: KeepDaemon) -> None:
        assert await _fetch(daemon, pinned, pin=True) == "done"
        uuid = await _clone(daemon, based)
        request = LaunchRequest(reference=based, instance="vm", readonly=(attached,))
        launched = await daemon.end(launch_intents.request_launch(daemon.db, ROOT, request))
        assert launched.state == "done", launched.error
        assert await _fetch(daemon, cold) == "done"
        ended = await daemon.end(image_intents.request_fetch(daemon.db, ROOT, wanted))
        assert ended.error is not None
        assert ended.error["code"] == "no-space"
        assert uuid in ended.error["message"] and "pinned" in ended.error["message"]
        assert await daemon.read_disk(host_number(daemon, uuid)) == host.shelf.contents[based]

    host.run(script)
    assert {pinned, based, attached} <= set(host.states())
    assert wanted not in host.states()
    plan = _plan(host)
    assert plan[pinned].kept_because == "pinned"
    assert (plan[based].kept_because or "").startswith("base of disks ")
    assert plan[attached].kept_because == "attached to instance vm"
    for identifier in (pinned, based, attached):
        with pytest.raises(Conflict) as caught:
            request_eviction(host.db, ROOT, image_id=identifier)
        assert caught.value.code == "image-held"
    assert os.listdir(host.configuration.state_dir / "stage") == []


def host_number(daemon: KeepDaemon, uuid: str) -> int:
    """Return the number of a disk."""
    return inventory.disk(daemon.db, ROOT, uuid).number


def test_shared_chunks_are_counted_once_and_stay(make: Callable[..., KeepHost]) -> None:
    """What the plan says an eviction frees is what it frees; what others need stays."""
    host = make()
    common = _content(9, 3)
    ids = [host.shelf.add(common + _content(seed, 2)) for seed in range(3)]
    twin = host.shelf.add(common)

    async def fill(daemon: KeepDaemon) -> None:
        for identifier in (*ids, twin):
            assert await _fetch(daemon, identifier) == "done"
        await daemon.end(image_intents.request_fetch(daemon.db, ROOT, ids[2], pin=True))

    host.run(fill)
    plan = _plan(host)
    assert [plan[name].order for name in ids[:2]] == [1, 2]
    assert [plan[name].footprint.freed_bytes for name in ids[:2]] == [2 * CHUNK_BYTES] * 2
    assert (plan[twin].kept_because or "").startswith("nothing to gain")
    before = len(host.chunk_files())

    async def evict(daemon: KeepDaemon) -> None:
        ended = await daemon.end(request_eviction(daemon.db, ROOT, size_bytes=3 * CHUNK_BYTES))
        assert ended.result == {"freed_bytes": 4 * CHUNK_BYTES}
        for identifier in (ids[2], twin):
            assert await daemon.read_image(identifier) == host.shelf.contents[identifier]

    host.run(evict)
    assert before - len(host.chunk_files()) == 4
    assert set(host.states()) == {ids[2], twin}


def test_requests_are_judged(make: Callable[..., KeepHost]) -> None:
    """Only administrators evict, and they say one thing at a time."""
    host = make()
    with pytest.raises(Refused):
        request_eviction(host.db, Caller("somebody", "user"))
    with pytest.raises(InvalidInput):
        request_eviction(host.db, ROOT, image_id="x", size_bytes=1)


def test_launches_and_evictions_of_one_image_both_succeed(make: Callable[..., KeepHost]) -> None:
    """Whichever comes first, every clone reads the image's bytes and no launch is refused."""
    host = make()
    identifier = host.shelf.add(_content(1))

    async def script(daemon: KeepDaemon) -> None:
        assert await _fetch(daemon, identifier) == "done"
        uuids: list[str] = []

        async def clone() -> None:
            uuids.append(await _clone(daemon, identifier))

        async def evict() -> None:
            with suppress(Conflict):
                await daemon.end(request_eviction(daemon.db, ROOT, size_bytes=CHUNK_BYTES))

        for _ in range(8):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(evict)
                nursery.start_soon(clone)
            assert await daemon.read_disk(host_number(daemon, uuids[-1])) == _content(1)
            await daemon.end(disk_intents.delete_disk(daemon.db, ROOT, uuids[-1]))

    host.run(script)


@pytest.mark.parametrize("steps", range(26))
def test_an_eviction_that_dies_is_finished(make: Callable[..., KeepHost], steps: int) -> None:
    """After the death of the process at any step the image is there and whole, or gone with its
    chunks; done again, the operation ends."""
    fuse = Fuse()
    host = make(fuse=fuse)
    images = [host.shelf.add(_content(seed, 2)) for seed in range(3)]

    async def fill(daemon: KeepDaemon) -> None:
        for identifier in images:
            assert await _fetch(daemon, identifier) == "done"
        await daemon.rest()

    host.run(fill)
    operation = request_eviction(host.db, ROOT, size_bytes=3 * CHUNK_BYTES)
    fuse.left = steps
    try:
        host.rest()
    except BaseException as error:
        if not is_crash(error):
            raise
    fuse.left = None

    async def look(daemon: KeepDaemon) -> None:
        await daemon.rest()
        for identifier in host.states():
            assert await daemon.read_image(identifier) == host.shelf.contents[identifier]

    host.run(look)
    ended = inventory.operation(host.db, operation.id)
    assert ended.result == {"freed_bytes": 4 * CHUNK_BYTES}
    assert list(host.states()) == images[2:]
    report = cache_check.check(host.configuration, deep=True)
    assert (report.faults, report.leaks) == ([], [])


def test_verification_fetches_what_is_missing(make: Callable[..., KeepHost]) -> None:
    """An image that was verified is whole; one that cannot be made whole says so."""
    host = make()
    identifier = host.shelf.add(_content(1))
    request_scrub(host.db, ROOT, "pause")  # or its first pass may be there first

    async def script(daemon: KeepDaemon) -> None:
        assert await _fetch(daemon, identifier) == "done"
        flipped, missing = host.chunk_files()[:2]
        flipped.write_bytes(b"x" + flipped.read_bytes()[1:])
        missing.unlink()
        ended = await daemon.end(request_verification(daemon.db, ROOT, identifier))
        assert ended.result == {"chunks": 4, "repaired": 2}
        host.shelf.take_away(identifier)
        host.chunk_files()[0].unlink()
        ended = await daemon.end(request_verification(daemon.db, ROOT, identifier))
        assert ended.error is not None and ended.error["code"] == "image-damaged"

    host.run(script)
    kinds = [row["kind"] for row in host.db.rows("SELECT kind FROM events")]
    assert kinds.count("chunk.repaired") == 2
    assert kinds.count("chunk.lost") == 1
