"""Promotion of overlays to raw disks, interrupted at will, on ext4 and on XFS."""

import gc
import os
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from random import Random

import pytest
import trio
import trio.lowlevel
from support.disk_daemon import IMAGE, ROOT, DiskDaemon, DiskHost

from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.cache.errors import Conflict
from stratocache.fs import (
    attachment_intents,
    disk_intents,
    image_intents,
    inventory,
    operation_intents,
    snapshot_intents,
)
from stratocache.fs.records import DiskRequest

MIB = 1024**2
SIZE_BYTES = 24 * MIB
CONTENT = Random(11).randbytes(20 * MIB)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[DiskHost]:
    """A host on a file system without reflinks, with an image."""
    made = DiskHost(tmp_path, tmp_path / "state")
    made.publish(CONTENT)
    yield made
    made.close()


def clone(host: DiskHost) -> str:
    """Make a clone of the image."""
    uuid = "6b0f2d5e-4c1a-4c39-8f0e-" + os.urandom(6).hex()
    with host.db.transaction() as connection:
        disk_intents.insert_disk(
            connection, "root", uuid, DiskRequest(size_bytes=SIZE_BYTES),
            base_image=IMAGE, base_manifest=IMAGE,
        )  # fmt: skip
    host.rest()
    return uuid


def test_hydrated_disk_needs_no_image(host: DiskHost) -> None:
    """After hydration the disk is one file with the content it had, and the image can go."""
    uuid = clone(host)
    host.write(uuid, 3 * MIB + 5, b"written")
    expected = host.content(uuid)
    assert host.end(disk_intents.hydrate_disk(host.db, ROOT, uuid)).state == "done"
    host.end(image_intents.request_image_deletion(host.db, ROOT, IMAGE))

    assert host.content(uuid) == expected
    assert (host.disk(uuid).form, host.disk(uuid).base_manifest) == ("raw", None)
    assert os.listdir(host.configuration.state_dir / "disks" / uuid) == ["data"]
    assert host.manifests() == set()
    assert host.stored_chunks() == set()


def test_attached_disk_is_switched(host: DiskHost) -> None:
    """An attached overlay is hydrated while it is written; then its target serves the file."""
    uuid = clone(host)
    host.end(attachment_intents.attach(host.db, ROOT, uuid, instance="vm"))
    operation = disk_intents.hydrate_disk(host.db, ROOT, uuid)
    expected = bytearray(host.content(uuid))

    async def script(daemon: DiskDaemon) -> None:
        number, written = host.disk(uuid).number, 0
        while host.disk(uuid).form == "overlay":
            overlay = daemon.blocks.opened_overlay(number)
            if overlay is not None and host.targets.made:
                offset = written * 7919 * 512 % (SIZE_BYTES - 512)
                piece = written.to_bytes(4, "big") * 128
                await overlay.write(offset, piece)
                expected[offset : offset + 512] = piece
                written += 1
            await trio.lowlevel.checkpoint()
        assert written
        await daemon.rest()

    host.run(script)
    assert inventory.operation(host.db, operation.id).state == "done"
    assert host.targets.log == [f"create {uuid}", "remove", "create data"]
    assert host.content(uuid) == expected


def test_interrupted_hydration_goes_on(host: DiskHost) -> None:
    """A hydration that the end of the process interrupts is continued by the next one, from where
    it was."""
    uuid = clone(host)
    expected = host.content(uuid)
    operation = disk_intents.hydrate_disk(host.db, ROOT, uuid)

    async def die(daemon: DiskDaemon) -> None:
        number = host.disk(uuid).number
        while (overlay := daemon.blocks.opened_overlay(number)) is None:
            await trio.lowlevel.checkpoint()
        while overlay.local_bytes < 4 * CHUNK_BYTES:
            await trio.lowlevel.checkpoint()

    host.run(die)
    assert host.disk(uuid).form == "overlay"
    assert inventory.operation(host.db, operation.id).state == "running"
    assert host.disks().allocated_bytes(uuid) >= 4 * CHUNK_BYTES
    assert host.end(operation).state == "done"
    assert host.content(uuid) == expected


def test_cancelled_hydration_leaves_an_overlay(host: DiskHost) -> None:
    """Cancelling ends the operation; the disk stays what it was and can be hydrated later."""
    uuid = clone(host)
    expected = host.content(uuid)
    operation = disk_intents.hydrate_disk(host.db, ROOT, uuid)

    async def cancel(daemon: DiskDaemon) -> None:
        while daemon.blocks.opened_overlay(host.disk(uuid).number) is None:
            await trio.lowlevel.checkpoint()
        operation_intents.request_cancel(host.db, ROOT, operation.id)
        await daemon.rest()

    host.run(cancel)
    assert inventory.operation(host.db, operation.id).state == "cancelled"
    assert host.disk(uuid).form == "overlay"
    assert host.content(uuid) == expected
    assert host.end(disk_intents.hydrate_disk(host.db, ROOT, uuid)).state == "done"
    assert host.content(uuid) == expected


def test_snapshot_during_hydration(host: DiskHost) -> None:
    """A snapshot taken meanwhile is right, and so is the disk that is complete in the end."""
    uuid = clone(host)
    host.write(uuid, MIB, b"of both")
    expected = host.content(uuid)
    hydration = disk_intents.hydrate_disk(host.db, ROOT, uuid)

    async def script(daemon: DiskDaemon) -> None:
        number = host.disk(uuid).number
        while (overlay := daemon.blocks.opened_overlay(number)) is None:
            await trio.lowlevel.checkpoint()
        while overlay.local_bytes < 2 * CHUNK_BYTES:
            await trio.lowlevel.checkpoint()
        snapshot_intents.create_snapshot(host.db, ROOT, uuid)
        await daemon.rest()

    host.run(script)
    assert inventory.operation(host.db, hydration.id).state == "done"
    assert host.disk(uuid).form == "raw"
    assert host.content(uuid) == expected
    (kept,) = inventory.snapshots(host.db, uuid)
    host.write(uuid, MIB, b"no more")
    assert host.end(snapshot_intents.rollback(host.db, ROOT, uuid, kept.id)).state == "done"
    assert host.content(uuid) == expected


def test_hydration_is_asked_for_once(host: DiskHost) -> None:
    """Asked again the operation under way is the answer, and a raw disk has nothing to hydrate."""
    uuid = clone(host)
    first = disk_intents.hydrate_disk(host.db, ROOT, uuid)
    assert disk_intents.hydrate_disk(host.db, ROOT, uuid).id == first.id
    host.end(first)

    with pytest.raises(Conflict) as caught:
        disk_intents.hydrate_disk(host.db, ROOT, uuid)
    assert caught.value.code == "disk-raw"


def test_deleting_a_disk_ends_its_hydration(host: DiskHost) -> None:
    """A disk that is being hydrated can be deleted; nothing of it is left."""
    uuid = clone(host)
    operation = disk_intents.hydrate_disk(host.db, ROOT, uuid)

    async def script(daemon: DiskDaemon) -> None:
        while daemon.blocks.opened_overlay(host.disk(uuid).number) is None:
            await trio.lowlevel.checkpoint()
        disk_intents.delete_disk(host.db, ROOT, uuid)
        await daemon.rest()

    host.run(script)
    assert inventory.operation(host.db, operation.id).state == "cancelled"
    assert os.listdir(host.configuration.state_dir / "disks") == []
    assert os.listdir(host.configuration.run_dir / "live") == []


@pytest.mark.root
def test_overlays_promote_themselves_where_extents_are_shared(tmp_path: Path) -> None:
    """On XFS clones are raw at birth, and an overlay made by a rollback becomes raw by itself."""
    backing, mounted = tmp_path / "xfs.img", tmp_path / "xfs"
    mounted.mkdir()
    with backing.open("wb") as file:
        file.truncate(400 * MIB)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", backing], check=True)
    subprocess.run(["mount", "-o", "loop", backing, mounted], check=True)
    try:
        with closing(DiskHost(tmp_path, mounted / "state")) as host:
            _check_self_promotion(host)
    finally:
        gc.collect()  # descriptors of chunks are closed with the last who refers to them
        subprocess.run(["umount", mounted], check=True)


def _check_self_promotion(host: DiskHost) -> None:
    host.publish(CONTENT)
    uuid = clone(host)
    assert host.disk(uuid).form == "raw"
    expected = host.content(uuid)
    host.disks().rollback_overlay(uuid, IMAGE, SIZE_BYTES)
    host.db.connection.execute("UPDATE disks SET form = 'overlay', base_manifest = ?", (IMAGE,))
    host.rest()
    host.rest()

    assert host.disk(uuid).form == "raw"
    assert host.content(uuid) == expected
