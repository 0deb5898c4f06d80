"""Snapshots on real files, on ext4 (layers and manifests) and on XFS (reflinks)."""

import gc
import hashlib
import os
import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest
import trio
import trio.lowlevel
from support.disk_daemon import IMAGE, ROOT, DiskDaemon, DiskHost

from stratocache.cache import document
from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.cache.errors import Conflict, InvalidInput, NotFound, StratocacheError
from stratocache.cache.identifier import encode
from stratocache.fs import (
    attachment_intents,
    disk_check,
    disk_intents,
    image_intents,
    inventory,
    snapshot_intents,
)
from stratocache.fs.records import Caller, DiskRequest, SaveRequest
from stratocache.fs.run_directory import RunDirectory

MIB = 1024**2
SIZE_BYTES = 8 * MIB + 512
CONTENT = Random(7).randbytes(6 * MIB + 1234).ljust(6 * MIB + 1536, b"\1")


@pytest.fixture
def host(tmp_path: Path) -> Iterator[DiskHost]:
    """A host on a file system without reflinks, with an image."""
    made = DiskHost(tmp_path, tmp_path / "state")
    made.publish(CONTENT)
    yield made
    made.close()


@pytest.fixture
def xfs_host(tmp_path: Path) -> Iterator[DiskHost]:
    """A host on XFS with reflinks."""
    backing, mounted = tmp_path / "xfs.img", tmp_path / "xfs"
    mounted.mkdir()
    with backing.open("wb") as file:
        file.truncate(400 * MIB)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", backing], check=True)
    subprocess.run(["mount", "-o", "loop", backing, mounted], check=True)
    try:
        made = DiskHost(tmp_path, mounted / "state")
        made.publish(CONTENT)
        yield made
        made.close()
    finally:
        gc.collect()  # descriptors of chunks are closed with the last who refers to them
        subprocess.run(["umount", mounted], check=True)


@pytest.fixture(params=["ext4", pytest.param("xfs", marks=pytest.mark.root)])
def any_host(request: pytest.FixtureRequest) -> DiskHost:
    """A host of either kind."""
    found = request.getfixturevalue("xfs_host" if request.param == "xfs" else "host")
    assert isinstance(found, DiskHost)
    return found


def clone(host: DiskHost, size_bytes: int = SIZE_BYTES, **fields: object) -> str:
    """Make a clone of the image, as the operation of a reference would."""
    uuid = "6b0f2d5e-4c1a-4c39-8f0e-" + os.urandom(6).hex()
    with host.db.transaction() as connection:
        request = DiskRequest(size_bytes=size_bytes, **fields)  # type: ignore[arg-type]
        disk_intents.insert_disk(
            connection, "root", uuid, request, base_image=IMAGE, base_manifest=IMAGE
        )
    host.rest()
    return uuid


def create(host: DiskHost, **fields: object) -> str:
    """Make a disk."""
    request = DiskRequest(**fields)  # type: ignore[arg-type]
    operation = host.end(disk_intents.create_disk(host.db, ROOT, request))
    assert operation.state == "done", operation.error
    return operation.subject


def snapshot(host: DiskHost, uuid: str) -> str:
    """Take a snapshot."""
    operation = host.end(snapshot_intents.create_snapshot(host.db, ROOT, uuid))
    assert operation.state == "done", operation.error
    return operation.subject


def rollback(host: DiskHost, uuid: str, snapshot_id: str) -> None:
    """Roll a disk back."""
    operation = host.end(snapshot_intents.rollback(host.db, ROOT, uuid, snapshot_id))
    assert operation.state == "done", operation.error


def refusal(call: object, *arguments: object, **options: object) -> tuple[type, str]:
    """Return the category and code of what a call raises."""
    with pytest.raises(StratocacheError) as caught:
        call(*arguments, **options)  # type: ignore[operator]
    return type(caught.value), caught.value.code


@pytest.mark.root
def test_disks_are_deleted_together_and_fail_singly(host: DiskHost) -> None:
    """Of several disks that go at once one whose files cannot go stays until they can; the others
    are gone, with their snapshots and the manifests that nothing else names."""
    hindered, *others = [clone(host) for _ in range(3)]
    host.write(others[0], 0, b"changed")
    taken = snapshot(host, others[0])
    host.rest()
    assert host.manifests() == {IMAGE, taken}

    async def ended(daemon: DiskDaemon) -> None:
        with trio.fail_after(60):
            while inventory.operation(host.db, asked[-1].id).state != "done":  # noqa: ASYNC110 -- rows tell nobody
                await trio.sleep(0.01)

    directory = host.configuration.state_dir / "disks" / hindered
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", directory], check=True)
    try:
        asked = [
            disk_intents.delete_disk(host.db, ROOT, uuid, with_snapshots=True)
            for uuid in (hindered, *others)
        ]
        host.run(ended)
        assert [inventory.operation(host.db, each.id).state for each in asked] == [
            "pending", "done", "done",
        ]  # fmt: skip
        assert [row["uuid"] for row in host.db.rows("SELECT uuid FROM disks")] == [hindered]
        assert host.db.rows("SELECT id FROM snapshots") == []
        assert host.manifests() == {IMAGE}
    finally:
        subprocess.run(["umount", directory], check=True)
    assert host.end(asked[0]).state == "done"


def test_rollback_to_any_of_many_snapshots(any_host: DiskHost) -> None:
    """Each snapshot of a long row gives back what the disk was, in any order."""
    host, chance = any_host, Random(1)
    uuid = clone(host)
    known = {}
    for _ in range(8):
        host.write(uuid, chance.randrange(SIZE_BYTES - 9000), chance.randbytes(9000))
        known[snapshot(host, uuid)] = host.content(uuid)
    host.write(uuid, 0, b"lost")

    for snapshot_id in chance.sample(list(known), len(known)):
        rollback(host, uuid, snapshot_id)
        assert host.content(uuid) == known[snapshot_id]
        host.write(uuid, 100, b"written after the rollback")
    assert [item.state for item in inventory.snapshots(host.db, uuid)] == ["available"] * 8


def test_chain_of_snapshots_costs_no_more_files(host: DiskHost) -> None:
    """However many snapshots an overlay has, it has one layer and one base."""
    uuid = clone(host)
    for number in range(6):
        host.write(uuid, number * CHUNK_BYTES, b"changed")
        last = snapshot(host, uuid)

    layout = host.disks().layout(uuid)
    assert (layout.frozen, layout.base) == (None, last)
    assert len(os.listdir(host.configuration.state_dir / "disks" / uuid)) == 3


def test_snapshot_stores_changed_chunks_only(host: DiskHost) -> None:
    """Absorbing adds as many chunks as were touched, and the one that the image ends within."""
    uuid = clone(host)
    before = host.stored_chunks()
    host.write(uuid, CHUNK_BYTES + 5, b"a")
    host.write(uuid, 3 * CHUNK_BYTES - 2, b"across")
    snapshot(host, uuid)

    assert len(host.stored_chunks() - before) == 3 + 1


def test_snapshot_of_a_blank_disk(any_host: DiskHost) -> None:
    """A raw disk is what it was after snapshot and rollback; what it wrote in between is gone."""
    host = any_host
    uuid = create(host, size_bytes=3 * MIB)
    host.write(uuid, MIB, b"kept")
    kept = snapshot(host, uuid)
    before = host.content(uuid)
    assert before[MIB : MIB + 4] == b"kept"
    host.write(uuid, MIB, b"lost")
    rollback(host, uuid, kept)

    assert host.content(uuid) == before


def test_snapshot_deleted_anywhere_leaves_the_others(any_host: DiskHost) -> None:
    """Deleting the first, the middle and the last snapshot changes neither disk nor the rest."""
    host = any_host
    uuid = clone(host)
    known = {}
    for number in range(5):
        host.write(uuid, number * MIB, b"%d" % number)
        known[snapshot(host, uuid)] = host.content(uuid)
    now = host.content(uuid)
    order = list(known)
    for gone in (order[0], order[2], order[4]):
        operation = snapshot_intents.delete_snapshot(host.db, ROOT, uuid, gone)
        assert host.end(operation).state == "done"

    assert host.content(uuid) == now
    for snapshot_id in (order[3], order[1]):
        rollback(host, uuid, snapshot_id)
        assert host.content(uuid) == known[snapshot_id]
    named = {IMAGE} | {item.id for item in inventory.snapshots(host.db, uuid)}
    assert host.manifests() <= named


def test_clone_outlives_snapshot_and_disk(any_host: DiskHost) -> None:
    """A clone of a snapshot stays what it is when the snapshot and its disk are deleted."""
    host = any_host
    uuid = clone(host)
    host.write(uuid, 10, b"of the parent")
    origin = snapshot(host, uuid)
    expected = host.content(uuid)
    other = create(host, snapshot=origin, size_bytes=SIZE_BYTES + MIB)
    host.write(uuid, 10, b"later")
    deleted = disk_intents.delete_disk(host.db, ROOT, uuid, with_snapshots=True)
    assert host.end(deleted).state == "done"

    assert host.content(other) == expected.ljust(SIZE_BYTES + MIB, b"\0")
    host.end(disk_intents.delete_disk(host.db, ROOT, other))
    assert host.manifests() == {IMAGE}
    assert os.listdir(host.configuration.state_dir / "disks") == []


def test_disk_with_snapshots_is_not_deleted_by_accident(host: DiskHost) -> None:
    """Deleting a disk with snapshots is refused and names them."""
    uuid = clone(host)
    kept = snapshot(host, uuid)

    with pytest.raises(Conflict, match=kept) as caught:
        disk_intents.delete_disk(host.db, ROOT, uuid)
    assert caught.value.code == "disk-has-snapshots"


def test_image_is_free_once_no_overlay_reads_it(host: DiskHost) -> None:
    """The image of a disk with a snapshot can be deleted: the snapshot has all that is needed."""
    uuid = clone(host)
    assert refusal(image_intents.request_image_deletion, host.db, ROOT, IMAGE)[1] == "image-in-use"
    expected = host.content(uuid)
    snapshot(host, uuid)
    host.end(image_intents.request_image_deletion(host.db, ROOT, IMAGE))

    assert host.content(uuid) == expected
    assert IMAGE not in host.manifests()


def test_snapshot_of_an_attached_disk(any_host: DiskHost) -> None:
    """An attached disk can be kept; its target is made anew only where its file changes."""
    host = any_host
    uuid = create(host, size_bytes=MIB)
    host.end(attachment_intents.attach(host.db, ROOT, uuid, instance="vm"))
    kept = snapshot(host, uuid)
    snapshot(host, uuid)

    reflinks = host.disks().reflink_supported()
    backing = "data" if reflinks else uuid
    assert host.targets.log == ["create data"] + ([] if reflinks else ["remove", f"create {uuid}"])
    assert [target.backing.name for target in host.targets.made.values()] == [backing]
    assert refusal(snapshot_intents.rollback, host.db, ROOT, uuid, kept)[1] == "disk-attached"


def test_snapshots_wait_for_one_another(host: DiskHost) -> None:
    """Snapshots that are asked for at once are taken one after the other."""
    uuid = clone(host)
    host.write(uuid, 0, b"first")
    asked = [snapshot_intents.create_snapshot(host.db, ROOT, uuid) for _ in range(3)]
    host.rest()

    found = inventory.snapshots(host.db, uuid)
    assert [item.id for item in found] == [operation.subject for operation in asked]
    assert {item.state for item in found} == {"available"}
    frozen = [item.frozen_at or "" for item in found]
    assert frozen == sorted(frozen)


def test_writes_while_absorbing_are_not_the_snapshots(host: DiskHost) -> None:
    """What is written right after the freeze is the disk's and not the snapshot's."""
    uuid = clone(host)
    host.write(uuid, 0, b"before")
    expected = host.content(uuid)
    operation = snapshot_intents.create_snapshot(host.db, ROOT, uuid)

    async def script(daemon: DiskDaemon) -> None:
        while not inventory.operation(host.db, operation.id).finished:
            await trio.lowlevel.checkpoint()
        overlay = await daemon.blocks.open_overlay(host.disk(uuid).number)
        await overlay.write(0, b"behind")
        await overlay.write(5 * MIB, b"behind")
        await overlay.flush()
        await daemon.rest()

    host.run(script)
    assert host.content(uuid)[:6] == b"behind"
    rollback(host, uuid, operation.subject)
    assert host.content(uuid) == expected


def test_growth_keeps_what_is_there(any_host: DiskHost) -> None:
    """Disks of both forms grow by zeros, and a rollback behind a growth keeps the new size."""
    host = any_host
    for uuid in (clone(host), create(host, size_bytes=MIB)):
        host.write(uuid, 4096, b"kept")
        before = host.content(uuid)
        kept = snapshot(host, uuid)
        larger = len(before) + 3 * MIB + 512
        operation = disk_intents.resize_disk(host.db, ROOT, uuid, larger)
        assert host.end(operation).state == "done"
        assert host.content(uuid) == before.ljust(larger, b"\0")
        assert host.disk(uuid).size_bytes == larger
        host.write(uuid, larger - 512, b"end")
        rollback(host, uuid, kept)
        assert host.content(uuid) == before.ljust(larger, b"\0")


def test_growth_makes_the_target_anew(any_host: DiskHost) -> None:
    """An attached disk that grows is exported again under the same number, once."""
    host = any_host
    uuid = create(host, size_bytes=MIB)
    host.end(attachment_intents.attach(host.db, ROOT, uuid, instance="vm"))
    host.end(disk_intents.resize_disk(host.db, ROOT, uuid, 2 * MIB))
    host.rest()

    assert host.targets.log == ["create data", "remove", "create data"]
    (item,) = inventory.attachments(host.db)
    assert item.generation == host.disk(uuid).generation == 1


def test_disks_do_not_shrink(host: DiskHost) -> None:
    """A smaller size is refused and nothing is asked for."""
    uuid = clone(host)
    refused = refusal(disk_intents.resize_disk, host.db, ROOT, uuid, SIZE_BYTES - 512)

    assert refused == (InvalidInput, "size-shrinks")
    assert inventory.open_operations(host.db, uuid, "resize") == []


def test_saved_disk_is_an_image(any_host: DiskHost) -> None:
    """A saved disk is a verified local image of the disk's content, its metadata tells its digests,
    and only changed chunks were stored; nothing of the save's own snapshot stays."""
    host = any_host
    uuid = clone(host)
    host.write(uuid, 2 * MIB + 77, b"changed")
    expected = host.content(uuid)
    before = host.stored_chunks()
    request = SaveRequest(title="mine", os="debian", os_version="13", os_arch="x86_64")
    operation = host.end(snapshot_intents.save_disk(host.db, ROOT, uuid, request))

    assert operation.state == "done", operation.error
    assert operation.result is not None
    image = inventory.image(host.db, operation.result["image"])
    assert image.id == encode(hashlib.sha1(expected).hexdigest())
    assert image.sha256 == hashlib.sha256(expected).hexdigest()
    assert (image.state, image.entry.catalogue, image.entry.trust) == (
        "verified", "local", "unsigned",
    )  # fmt: skip
    reader = host.images().reader(image.id)
    assert reader.read_blocking(0, reader.size_bytes) == expected
    # the changed one, and the last of the image, which the disk continues by zeros
    assert len(host.stored_chunks() - before) == 2
    text = operation.result["metadata"]
    assert hashlib.sha512(expected).hexdigest() in text
    assert document.parse_one(text.encode()).signatures == []
    assert inventory.snapshots(host.db, uuid) == []
    assert host.manifests() <= {IMAGE, image.id, host.disk(uuid).base_manifest or IMAGE}


def test_saving_a_snapshot_twice_makes_one_image(host: DiskHost) -> None:
    """The same content saved again answers with the same image."""
    uuid = clone(host)
    kept = snapshot(host, uuid)
    host.write(uuid, 0, b"not of the snapshot")
    request = SaveRequest(snapshot=kept)
    saved = [
        host.end(snapshot_intents.save_disk(host.db, ROOT, uuid, request)).result for _ in range(2)
    ]

    assert saved[0] is not None
    assert saved[1] is not None
    assert saved[0]["image"] == saved[1]["image"]
    assert [image.id for image in inventory.images(host.db)] == [IMAGE, saved[0]["image"]]


def test_quarantined_disk_is_kept_read_only_then_goes(host: DiskHost) -> None:
    """A volatile disk in quarantine cannot be attached read-write, and is deleted when its time is
    over, though it was looked at."""
    uuid = clone(host, volatile=True)
    host.end(attachment_intents.attach(host.db, ROOT, uuid, instance="vm"))
    (item,) = inventory.attachments(host.db)
    with host.db.transaction() as connection:
        connection.execute("UPDATE disks SET quarantined_at = '2100-01-01' WHERE uuid = ?", (uuid,))
        attachment_intents.remove_attachment(connection, item)
    host.rest()
    assert (
        refusal(attachment_intents.attach, host.db, ROOT, uuid, instance="vm2")[1]
        == "disk-quarantined"
    )
    host.end(attachment_intents.attach(host.db, ROOT, uuid, instance="look", access="ro"))
    host.db.connection.execute("UPDATE disks SET quarantined_at = '2026-01-01'")
    host.rest()
    assert inventory.find_disk(host.db, uuid) is not None
    (looking,) = inventory.attachments(host.db)
    host.end(attachment_intents.detach(host.db, ROOT, looking.id))

    assert inventory.find_disk(host.db, uuid) is None
    kinds = [row["kind"] for row in host.db.rows("SELECT kind FROM events WHERE subject = ?", uuid)]
    assert "disk.quarantine-over" in kinds


def test_restored_disk_is_an_ordinary_one(host: DiskHost) -> None:
    """A disk taken out of quarantine is not volatile any more."""
    uuid = clone(host, volatile=True)
    refused = refusal(disk_intents.restore_disk, host.db, ROOT, uuid)
    assert refused == (Conflict, "disk-not-quarantined")
    host.db.connection.execute("UPDATE disks SET quarantined_at = ?", ("2100-01-01",))
    restored = disk_intents.restore_disk(host.db, ROOT, uuid)

    assert (restored.volatile, restored.quarantined_at) == (False, None)
    assert host.end(attachment_intents.attach(host.db, ROOT, uuid, instance="vm")).state == "done"


def test_snapshots_of_others_do_not_exist(host: DiskHost) -> None:
    """Who may not see a disk sees none of its snapshots, and clones none; who may only read it
    takes and deletes none."""
    bob = Caller("bob", "user")
    uuid = clone(host)
    kept = snapshot(host, uuid)
    wanted = DiskRequest(snapshot=kept)

    assert refusal(disk_intents.create_disk, host.db, bob, wanted) == (NotFound, "snapshot-unknown")
    unknown = refusal(snapshot_intents.delete_snapshot, host.db, bob, uuid, kept)
    assert unknown == (NotFound, "disk-unknown")
    disk_intents.update_disk(host.db, ROOT, uuid, visibility="public")
    for refused in (
        refusal(snapshot_intents.create_snapshot, host.db, bob, uuid),
        refusal(snapshot_intents.delete_snapshot, host.db, bob, uuid, kept),
        refusal(snapshot_intents.rollback, host.db, bob, uuid, kept),
        refusal(snapshot_intents.save_disk, host.db, bob, uuid, SaveRequest()),
        refusal(disk_intents.resize_disk, host.db, bob, uuid, SIZE_BYTES + 512),
        refusal(disk_intents.hydrate_disk, host.db, bob, uuid),
    ):
        assert refused[1] == "disk-not-yours"
    assert disk_intents.create_disk(host.db, bob, wanted).state == "pending"


def test_check_finds_nothing_in_what_is_under_way(
    any_host: DiskHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a daemon a check finds no fault where files have changed and their row has not yet."""
    host = any_host
    transaction = host.db.transaction
    looking = threading.Lock()
    looks: list[disk_check.Report] = []

    @contextmanager
    def watched() -> Iterator[sqlite3.Connection]:
        with looking:
            looks.append(disk_check.check(host.configuration))
        with transaction() as connection:
            yield connection

    uuid = clone(host)
    with RunDirectory(host.configuration.run_dir).lock():
        monkeypatch.setattr(host.db, "transaction", watched)
        kept = snapshot(host, uuid)
        host.write(uuid, 4096, b"changed")
        snapshot(host, uuid)
        host.end(disk_intents.resize_disk(host.db, ROOT, uuid, SIZE_BYTES + MIB))
        rollback(host, uuid, kept)
        if host.disk(uuid).form == "overlay":  # else it became raw by itself
            host.end(disk_intents.hydrate_disk(host.db, ROOT, uuid))
        snapshot(host, uuid)
        host.write(uuid, 8192, b"changed again")
        snapshot(host, uuid)
    assert [report.faults for report in looks] == [[]] * len(looks)
    assert sum(report.disks for report in looks) > 8
