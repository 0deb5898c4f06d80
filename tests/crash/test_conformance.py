"""libiscsi's conformance suite against bare tgt and, beside it, against our raw and overlay disks.

`make test` runs three quick groups; with CRASH_ROUNDS set, as in `make crash`, all of them.
`lio_conformance.py` does the same with LIO.
"""

import os
from pathlib import Path
from typing import Any

import pytest
from support.appliance import Appliance
from support.conformance import compare, groups
from support.guests import BareTarget
from support.publishing import publish_image

QUICK = ("Inquiry", "Read16", "ReadCapacity16")
YARDSTICKS = {"raw": "bare-thin", "overlay": "bare"}
"""Raw disks offer UNMAP; what tgt gets wrong there it gets wrong without us."""
EVERY_GROUP = "CRASH_ROUNDS" in os.environ
BASE_BYTES = 12 * 1024**2
DISK_BYTES = 16 * 1024**2
LIMIT_S = 60

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(7200)]


def test_no_group_is_worse_through_us(tmp_path: Path) -> None:
    """What bare tgt passes with the same features, tgt as we run it passes too."""
    published = publish_image(tmp_path / "published", BASE_BYTES)
    bare_files = [tmp_path / "bare", tmp_path / "bare-thin"]
    for bare_file in bare_files:
        with bare_file.open("wb") as file:
            file.truncate(DISK_BYTES)
    with (
        BareTarget() as bare,
        Appliance(
            tmp_path / "appliance", endpoint=published.endpoint, fingerprint=published.fingerprint
        ) as appliance,
    ):
        names = [bare.export(bare_files[0]), bare.export(bare_files[1], thin=True)]
        portal = f"iscsi://{bare.user}%{bare.secret}@127.0.0.1:{bare.port}"
        urls = {
            "bare": f"{portal}/{names[0]}/1",
            "bare-thin": f"{portal}/{names[1]}/1",
            "raw": _attach(appliance, {"size_bytes": DISK_BYTES}),
            "overlay": _attach(
                appliance, {"reference": published.identifier, "size_bytes": DISK_BYTES}
            ),
        }
        assert compare(groups() if EVERY_GROUP else QUICK, urls, YARDSTICKS, LIMIT_S) == []


def _attach(appliance: Appliance, request: dict[str, Any]) -> str:
    """Create and attach a disk; return its URL."""
    status, disk = appliance.request("POST", "/v1/disks", request)
    assert status == 201, disk
    path = f"/v1/disks/{disk['uuid']}/attachments"
    status, attachment = appliance.request("POST", path, {"instance": disk["uuid"]})
    assert status == 201, attachment
    url: str = attachment["iscsi_url"]
    return url
