"""A host that goes down and comes up again, as seen by initiators on other hosts."""

import shutil
import subprocess
from pathlib import Path

import pytest
from support.appliance import Appliance
from support.iscsi import Guest, Initiator
from support.publishing import publish_image

MIB = 1024**2

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(300)]


def test_attachments_come_back_after_a_reboot(tmp_path: Path) -> None:
    """After the end of every process and the loss of everything below RUN_DIR each attachment is
    there again with the same name, secret and serial, and initiators that have been trying all the
    while go on without an error."""
    published = publish_image(tmp_path / "published", 4 * MIB)
    appliance = Appliance(
        tmp_path / "appliance", endpoint=published.endpoint, fingerprint=published.fingerprint
    )
    guests = []
    with appliance:
        try:
            before = []
            for request in ({"size_bytes": 4 * MIB}, {"reference": published.identifier}):
                status, disk = appliance.request("POST", "/v1/disks", request)
                assert status == 201, disk
                path = f"/v1/disks/{disk['uuid']}/attachments"
                status, item = appliance.request("POST", path, {"instance": "vm1"})
                assert status == 201, item
                before.append((path, item))
                chap = item["chap"]
                initiator = Initiator(
                    appliance.port, item["target_iqn"], chap["username"], chap["secret"]
                )
                guests.append(Guest(initiator))
            for guest in guests:
                guest.round()
            appliance.kill()
            subprocess.run(["umount", "-l", str(appliance.run_dir / "blocks")], check=True)
            shutil.rmtree(appliance.run_dir)

            appliance.start()

            for guest, (path, item) in zip(guests, before, strict=True):
                guest.round()
                assert appliance.request("GET", path)[1]["attachments"] == [item]
        finally:
            for guest in guests:
                guest.kill()
