"""Skeletons: what eviction leaves of an image, what a launch makes of it, and when it goes too."""

from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
import trio
from support.keep_daemon import ROOT, KeepDaemon, KeepHost

from stratocache.cache import bootset
from stratocache.cache.catalogue import Standing
from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.fs import (
    cache_check,
    disk_intents,
    image_intents,
    inventory,
    provisional,
    withdrawal,
)
from stratocache.fs.eviction import request_eviction
from stratocache.fs.keep_plan import eviction_plan
from stratocache.fs.records import DiskRequest
from stratocache.fs.skeletons import record_reduction


@pytest.fixture
def host(tmp_path: Path) -> Iterator[KeepHost]:
    """A host whose cache holds nine chunks."""
    host = KeepHost(tmp_path, max_bytes=9 * CHUNK_BYTES, hysteresis_ratio=0)
    yield host
    host.close()


def _add(host: KeepHost, seed: int, boot_set: tuple[int, ...] = ()) -> str:
    """Offer an image of four chunks, some of which its boot is known to read."""
    content = Random(seed).randbytes(4 * CHUNK_BYTES)
    identifier = host.shelf.add(content)
    if boot_set:
        path = host.configuration.state_dir / "bootsets" / identifier
        bootset.write(path, bootset.encode(boot_set, len(content)))
    return identifier


async def _fetch(daemon: KeepDaemon, *identifiers: str) -> None:
    for identifier in identifiers:
        ended = await daemon.end(image_intents.request_fetch(daemon.db, ROOT, identifier))
        assert ended.error is None, ended.error


async def _clone(daemon: KeepDaemon, identifier: str) -> int:
    operation = disk_intents.create_disk(daemon.db, ROOT, DiskRequest(reference=identifier))
    ended = await daemon.end(operation)
    assert ended.error is None, ended.error
    return next(
        disk.number for disk in inventory.disks(daemon.db, ROOT) if disk.uuid == ended.subject
    )


async def _until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(60):
        while not condition():  # noqa: ASYNC110 -- it is in a database
            await trio.sleep(0.01)


def _plan(host: KeepHost) -> list[tuple[str, int, int]]:
    """Return what may go: image, chunks that its turn frees, chunks that stay at first."""
    return [
        (item.image.id, item.freed_bytes // CHUNK_BYTES, item.boot_bytes // CHUNK_BYTES)
        for item in eviction_plan(host.configuration, host.db)
        if item.order is not None
    ]


def test_room_is_made_down_to_the_boot_set_first(host: KeepHost) -> None:
    """The coldest image keeps what its boot reads; its boot set goes after all whole images."""
    cold, warm, third, fourth = (
        _add(host, 1, (2, 0)), _add(host, 2), _add(host, 3), _add(host, 4, (1,)),
    )  # fmt: skip

    async def script(daemon: KeepDaemon) -> None:
        await _fetch(daemon, cold, warm)
        assert _plan(host) == [(cold, 2, 2), (warm, 4, 0)]
        await _fetch(daemon, third)
        assert host.states() == {cold: "provisional", third: "verified"}
        assert len(host.chunk_files()) == 2 + 4
        assert _plan(host) == [(third, 4, 0), (cold, 2, 0)]
        await _fetch(daemon, fourth)
        assert host.states() == {cold: "provisional", fourth: "verified"}
        assert _plan(host) == [(fourth, 3, 1), (cold, 2, 0)]
        ended = await daemon.end(request_eviction(daemon.db, ROOT, size_bytes=20 * CHUNK_BYTES))
        assert ended.result == {"freed_bytes": 6 * CHUNK_BYTES}

    host.run(script)
    assert host.states() == {} and host.chunk_files() == []
    kinds = [row["kind"] for row in host.db.rows("SELECT kind FROM events ORDER BY number")]
    assert [kind for kind in kinds if kind in ("image.reduced", "image.evicted")] == [
        "image.reduced", "image.evicted", "image.evicted", "image.reduced", "image.evicted",
        "image.evicted",
    ]  # fmt: skip
    assert not {"chunk.lost", "chunk.repaired"} & set(kinds)


def test_a_skeleton_boots_without_its_origin_and_is_whole_again_with_it(
    host: KeepHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clone reads the boot set at once; what else it reads comes, and so does the rest."""
    monkeypatch.setattr(provisional, "RETRY_S", 0.2)
    cold = _add(host, 1, (0, 2))
    content = host.shelf.contents[cold]

    async def script(daemon: KeepDaemon) -> None:
        await _fetch(daemon, cold)
        await daemon.end(request_eviction(daemon.db, ROOT, size_bytes=1))
        assert len(host.chunk_files()) == 2
        await daemon.rest()
        assert len(host.chunk_files()) == 2
        assert cache_check.check(host.configuration).faults == []
        host.shelf.take_away(cold)
        number = await _clone(daemon, cold)
        overlay = await daemon.blocks.open_overlay(number)
        assert await overlay.read(2 * CHUNK_BYTES, 99) == content[2 * CHUNK_BYTES :][:99]
        host.shelf.bring_back(cold)
        assert await daemon.read_disk(number) == content
        await _fetch(daemon, cold)

    host.run(script)
    assert host.states() == {cold: "verified"}
    assert len(host.chunk_files()) == 4
    assert inventory.image(host.db, cold).skeleton_since is None


def test_a_skeleton_that_is_fetched_or_pinned_is_completed(host: KeepHost) -> None:
    """`image fetch` ends with a whole image, and a pin makes one whole as well."""
    first, second = _add(host, 1, (0,)), _add(host, 2, (0,))

    async def script(daemon: KeepDaemon) -> None:
        await _fetch(daemon, first, second)
        await daemon.end(request_eviction(daemon.db, ROOT, size_bytes=6 * CHUNK_BYTES))
        assert len(host.chunk_files()) == 2
        await _fetch(daemon, first)
        image_intents.set_pin(daemon.db, ROOT, second, True)
        daemon.wake()
        await _until(lambda: set(host.states().values()) == {"verified"})

    host.run(script)
    assert len(host.chunk_files()) == 8


def test_an_image_that_is_evicted_by_name_goes_whole(host: KeepHost) -> None:
    """Whoever names an image, or a skeleton, wants all of it gone."""
    whole, skeleton = _add(host, 1, (0,)), _add(host, 2, (0,))

    async def script(daemon: KeepDaemon) -> None:
        await _fetch(daemon, skeleton, whole)
        await daemon.end(request_eviction(daemon.db, ROOT, size_bytes=1))
        for identifier in (whole, skeleton):
            ended = await daemon.end(request_eviction(daemon.db, ROOT, image_id=identifier))
            assert ended.error is None

    host.run(script)
    assert host.states() == {} and host.chunk_files() == []


def test_a_death_between_the_decision_and_the_removal_loses_nothing(host: KeepHost) -> None:
    """The chunks that are still there belong to the skeleton, and go with it."""
    cold = _add(host, 1, (0, 2))

    async def fetch(daemon: KeepDaemon) -> None:
        await _fetch(daemon, cold)

    host.run(fetch)
    with host.db.transaction() as connection:
        assert record_reduction(connection, cold, 2 * CHUNK_BYTES)
    report = cache_check.check(host.configuration)
    assert report.faults == report.leaks == []

    async def go_on(daemon: KeepDaemon) -> None:
        assert _plan(host) == [(cold, 4, 0)]
        assert await daemon.read_image(cold) == host.shelf.contents[cold]
        await daemon.end(request_eviction(daemon.db, ROOT, size_bytes=1))

    host.run(go_on)
    assert host.states() == {} and host.chunk_files() == []


def test_a_boot_set_that_is_no_use_keeps_nothing(host: KeepHost) -> None:
    """Without a boot set, or with another image's, an image goes whole as it always did."""
    cold = _add(host, 1, (0, 2))
    path = host.configuration.state_dir / "bootsets" / cold
    bootset.write(path, bootset.encode([0], 77))

    async def script(daemon: KeepDaemon) -> None:
        await _fetch(daemon, cold)
        await daemon.end(request_eviction(daemon.db, ROOT, size_bytes=1))

    host.run(script)
    assert host.states() == {} and host.chunk_files() == []


def test_a_skeleton_that_is_taken_back_goes(host: KeepHost) -> None:
    """Nothing reads what is left of it, and nobody may launch it any more."""
    cold = _add(host, 1, (0, 2))

    async def script(daemon: KeepDaemon) -> None:
        await _fetch(daemon, cold)
        await daemon.end(request_eviction(daemon.db, ROOT, size_bytes=1))
        image = inventory.image(daemon.db, cold)
        standing = Standing("current")
        withdrawal.record(daemon.db, image, standing, confirm_s=0)
        assert host.states() == {cold: "provisional"}
        standing = Standing("taken-back", reason="No.")
        withdrawal.record(daemon.db, image, standing, confirm_s=0)
        daemon.wake()
        await _until(lambda: not host.states())

    host.run(script)
    assert host.chunk_files() == []
