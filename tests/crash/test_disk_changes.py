"""Snapshots, growth, hydration and saving of disks that a real initiator is using meanwhile."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.appliance import Appliance
from support.iscsi import Guest, Initiator
from support.publishing import Published, publish_image

IMAGE_BYTES = 8 * 1024**2
MIB = 1024**2

pytestmark = [pytest.mark.root, pytest.mark.slow]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """An image in a catalogue."""
    return publish_image(tmp_path_factory.mktemp("published"), IMAGE_BYTES)


@pytest.fixture
def appliance(tmp_path: Path, published: Published) -> Iterator[Appliance]:
    """A running appliance."""
    made = Appliance(
        tmp_path / "appliance", endpoint=published.endpoint, fingerprint=published.fingerprint
    )
    with made:
        yield made


def _initiator(appliance: Appliance, attachment: dict[str, Any]) -> Initiator:
    chap = attachment["chap"]
    return Initiator(appliance.port, attachment["target_iqn"], chap["username"], chap["secret"])


def test_busy_disk_is_kept_grown_completed_and_saved(
    appliance: Appliance, published: Published, tmp_path: Path
) -> None:
    """While a guest writes and reads back without an error, its disk is snapshotted, grown,
    hydrated and saved; the saved image boots others, and each kept state is right."""
    launch = appliance.json("launch", published.identifier, "--instance", "vm1")
    uuid = launch["boot"]["disk_uuid"]
    initiator = _initiator(appliance, launch["boot"])
    guest = Guest(initiator)
    try:
        guest.rounds(0.5)
        kept = [appliance.json("disk", "snapshot", uuid)["id"] for _ in range(2)]
        guest.rounds(0.5)
        grown = appliance.json("disk", "resize", uuid, str(IMAGE_BYTES + MIB))
        assert grown["size_bytes"] == IMAGE_BYTES + MIB
        guest.rounds(0.5)
        assert appliance.json("disk", "hydrate", uuid)["form"] == "raw"
        guest.rounds(0.5)
        kept.append(appliance.json("disk", "snapshot", uuid)["id"])
        guest.rounds(0.5)
    finally:
        guest.close()
    # a new login sees the new size
    assert initiator.io(f"write -P 7 {IMAGE_BYTES} {MIB}", "flush").returncode == 0
    metadata = tmp_path / "saved.xml"
    saved = appliance.json("disk", "save", uuid, "--output", str(metadata), "--title", "mine")
    listed = appliance.json("disk", "snapshots", uuid)["snapshots"]
    assert [item["id"] for item in listed] == kept
    assert (
        appliance.run("marketplace", "validate", "--allow-unsigned", str(metadata)).returncode == 0
    )

    refused = appliance.run("disk", "rollback", uuid, kept[0])
    assert refused.returncode == 4
    appliance.json("halt", "vm1", "--failed")
    assert appliance.json("disk", "show", uuid)["quarantined_at"] is not None
    appliance.json("disk", "restore", uuid)
    appliance.json("disk", "rollback", uuid, kept[0])
    clones = [appliance.json("disk", "create", "--snapshot", one)["uuid"] for one in kept]
    assert appliance.run("disk", "rm", uuid).returncode == 4
    appliance.json("disk", "rm", uuid, "--snapshots")
    for clone in clones:
        appliance.json("disk", "attach", clone, "--instance", "reader")

    content = (appliance.run_dir / "blocks" / "images" / saved["image"]).read_bytes()
    assert hashlib.sha256(content).hexdigest() == saved["sha256"]
    assert content[IMAGE_BYTES:] == b"\7" * MIB
    again = appliance.json("launch", saved["image"], "--instance", "vm2")
    read = _initiator(appliance, again["boot"]).io(f"read -P 7 {IMAGE_BYTES} {MIB}")
    assert read.returncode == 0 and "failed" not in read.stdout + read.stderr


def test_discard_of_a_raw_disk_frees_space(appliance: Appliance) -> None:
    """What a guest discards on a blank disk is free on the host."""
    disk = appliance.json("disk", "create", "--size", "8M")
    attachment = appliance.json("disk", "attach", disk["uuid"], "--instance", "vm")
    initiator = _initiator(appliance, attachment)
    data = appliance.state_dir / "disks" / disk["uuid"] / "data"
    assert initiator.io("write -P 3 0 8M", "flush").returncode == 0
    before = data.stat().st_blocks * 512
    assert initiator.io("discard 0 6M", "flush").returncode == 0

    assert before - data.stat().st_blocks * 512 == 6 * MIB
