"""A host that goes down and comes up again, as seen by initiators on other hosts."""

import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from support.appliance import Appliance
from support.iscsi import Guest, Initiator
from support.publishing import publish_image

MIB = 1024**2

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(300)]


def test_attachments_come_back_after_a_reboot(tmp_path: Path) -> None:
    """After the end of every process and the loss of everything below RUN_DIR each attachment is
    there again with the same name, secret and serial, and initiators that have been trying all the
    while go on without an error; a lease goes on running, and ends by itself."""
    published = publish_image(tmp_path / "published", 4 * MIB)
    appliance = Appliance(
        tmp_path / "appliance", endpoint=published.endpoint, fingerprint=published.fingerprint
    )
    guests = []
    with appliance:
        try:
            before = []
            for request in ({"size_bytes": 4 * MIB}, {"reference": published.identifier}):
                path, item = _attach(appliance, request)
                before.append((path, item))
                chap = item["chap"]
                initiator = Initiator(
                    appliance.port, item["target_iqn"], chap["username"], chap["secret"]
                )
                guests.append(Guest(initiator))
            leased = _attach(appliance, {"size_bytes": MIB}, lease_s=10)[0]
            for guest in guests:
                guest.round()
            appliance.kill()
            subprocess.run(["umount", "-l", str(appliance.run_dir / "blocks")], check=True)
            shutil.rmtree(appliance.run_dir)

            appliance.start()

            for guest, (path, item) in zip(guests, before, strict=True):
                guest.round()
                assert appliance.request("GET", path)[1]["attachments"] == [item]
            deadline = time.monotonic() + 60
            while appliance.request("GET", leased)[1]["attachments"]:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            assert appliance.request("POST", leased, {"instance": "vm2"})[0] == 201
        finally:
            for guest in guests:
                guest.kill()


def _attach(appliance: Appliance, request: dict[str, Any], **options: Any) -> tuple[str, Any]:
    """Create and attach a disk; return where its attachments are, and the attachment."""
    status, disk = appliance.request("POST", "/v1/disks", request)
    assert status == 201, disk
    path = f"/v1/disks/{disk['uuid']}/attachments"
    status, item = appliance.request("POST", path, {"instance": "vm1", **options})
    assert status == 201, item
    return path, item
