"""What a guest sees of its disks over iSCSI: TRIM gives space back, growth arrives while it runs."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from stratodemo.guest import Guest
from support.appliance import Appliance
from support.guests import file_disk, system_image
from support.monitor import Monitor, MonitorError
from support.publishing import Published, publish_image

MIB = 1024**2
DISK_BYTES = 48 * MIB
GROWN_BYTES = 80 * MIB
FILE_BYTES = 20 * MIB
TIMEOUT_S = 180

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(600)]

SCRIPT = f"""
raw="$(disk 1)"
overlay="$(disk 2)"
sizes() {{ echo "$(blockdev --getsize64 "$raw") $(blockdev --getsize64 "$overlay")"; }}
report before "$(sizes)"
mkfs.ext4 -q -E nodiscard "$raw" && mount "$raw" /mnt || exit 1
dd if=/dev/urandom of=/mnt/file bs={MIB} count={FILE_BYTES // MIB} 2>/dev/null || exit 1
sync
report written yes
read -r go
rm /mnt/file
sync
fstrim /mnt || exit 1
report trimmed yes
read -r go
while [ "$(sizes)" != "{GROWN_BYTES} {GROWN_BYTES}" ]; do
    sleep 1
done
report after "$(sizes)"
for device in "$raw" "$overlay"; do
    echo 'behind the old end' | dd of="$device" bs=512 seek={DISK_BYTES // 512 + 8} conv=fsync,notrunc \\
        2>/dev/null || exit 1
done
umount /mnt && e2fsck -f -n "$raw" > /dev/null && report clean yes
"""


@pytest.fixture
def published(tmp_path: Path) -> Published:
    """A small image in a marketplace of its own."""
    return publish_image(tmp_path / "published", 4 * MIB)


@pytest.fixture
def appliance(tmp_path: Path, published: Published) -> Iterator[Appliance]:
    """A running appliance."""
    made = Appliance(
        tmp_path / "appliance", endpoint=published.endpoint, fingerprint=published.fingerprint
    )
    with made:
        yield made


def _attached(appliance: Appliance, request: dict[str, object]) -> tuple[str, list[str]]:
    status, disk = appliance.request("POST", "/v1/disks", request)
    assert status == 201, disk
    path = f"/v1/disks/{disk['uuid']}/attachments"
    status, attachment = appliance.request("POST", path, {"instance": "vm"})
    assert status == 201, attachment
    return disk["uuid"], attachment["qemu_args"]


def _node(arguments: list[str]) -> str:
    found = re.search(r"node-name=([^,]+)", " ".join(arguments))
    assert found is not None
    return found[1]


def _resize(monitor: Monitor, node: str) -> None:
    """Tell QEMU, until its initiator has logged in to the larger disk."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            monitor.ask("block_resize", **{"node-name": node, "size": GROWN_BYTES})
            return
        except MonitorError:
            assert time.monotonic() < deadline, "QEMU does not see the larger disk"
            time.sleep(0.2)


def test_trim_and_growth_reach_through(
    appliance: Appliance, published: Published, tmp_path: Path
) -> None:
    """`fstrim` in the guest shrinks the disk's file on the host; after `disk resize` and QEMU's
    `block_resize` the running guest has the new size, raw and overlay, and writes there."""
    raw, raw_arguments = _attached(appliance, {"size_bytes": DISK_BYTES})
    overlay, overlay_arguments = _attached(
        appliance, {"reference": published.identifier, "size_bytes": DISK_BYTES}
    )
    data = appliance.state_dir / "disks" / raw / "data"
    control = tmp_path / "qmp"
    arguments = [
        *file_disk(system_image(), boot=True, readonly=True), *raw_arguments, *overlay_arguments,
        "-qmp", f"unix:{control},server=on,wait=off",
    ]  # fmt: skip
    with Guest(arguments, SCRIPT) as guest:
        guest.wait_for("written", TIMEOUT_S)
        assert guest.reports["before"] == f"{DISK_BYTES} {DISK_BYTES}"
        assert data.stat().st_blocks * 512 >= FILE_BYTES
        guest.send("go")
        guest.wait_for("trimmed", TIMEOUT_S)
        assert data.stat().st_blocks * 512 < FILE_BYTES // 2
        guest.send("go")

        for uuid in (raw, overlay):
            appliance.json("disk", "resize", uuid, str(GROWN_BYTES))
        monitor = Monitor(control)
        for node in (_node(raw_arguments), _node(overlay_arguments)):
            _resize(monitor, node)
        monitor.close()
        reports = guest.finish(TIMEOUT_S)
    assert reports["after"] == f"{GROWN_BYTES} {GROWN_BYTES}"
    assert reports["clean"] == "yes"
    assert not [line for line in guest.console if "I/O error" in line.text]
    at = DISK_BYTES + 8 * 512
    with data.open("rb") as file:
        file.seek(at)
        assert file.read(18) == b"behind the old end"
    served = appliance.run_dir / "blocks" / "disks" / overlay
    assert served.stat().st_size == GROWN_BYTES
    with served.open("rb") as file:
        file.seek(at)
        assert file.read(18) == b"behind the old end"
    appliance.json("disk", "detach", raw)
    appliance.json("disk", "detach", overlay)
    assert appliance.json("disk", "check")["faults"] == []
