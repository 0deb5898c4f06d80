"""A guest works on two disks while every process of the appliance is killed, or upgraded.

`make test` plays a handful of rounds; `make crash` what CRASH_ROUNDS says, 200 by default there.
The seed is printed; give it back as CRASH_SEED to choose the same victims and moments again.
"""

import os
import random
from pathlib import Path
from typing import Any

import pytest
from stratodemo.guest import Guest
from support.appliance import Appliance
from support.guests import file_disk, system_image
from support.kill_rounds import Assassin, pause_table
from support.publishing import publish_image
from support.writer import compile_writer, faults, verdicts, writer_script

ROUNDS = int(os.environ.get("CRASH_ROUNDS", "8"))
SEED = int(os.environ.get("CRASH_SEED", str(random.SystemRandom().randrange(2**32))))
BASE_BYTES = 12 * 1024**2
DISK_BYTES = 16 * 1024**2
BOOT_TIMEOUT_S = 120
FINAL_TIMEOUT_S = 120

pytestmark = [
    pytest.mark.root,
    pytest.mark.vm,
    pytest.mark.slow,
    pytest.mark.timeout(300 + 30 * ROUNDS),
]


def test_killed_processes_are_a_pause(tmp_path: Path) -> None:
    """Whoever is killed, alone, together or during an upgrade, and under upgrades alone, the guest
    sees no I/O error and no write is lost."""
    print(f"CRASH_SEED={SEED} CRASH_ROUNDS={ROUNDS}")
    published = publish_image(tmp_path / "published", BASE_BYTES)
    with Appliance(
        tmp_path / "appliance", endpoint=published.endpoint, fingerprint=published.fingerprint
    ) as appliance:
        disks = {
            "overlay": _attached(
                appliance, {"reference": published.identifier, "size_bytes": DISK_BYTES}
            ),
            "raw": _attached(appliance, {"size_bytes": DISK_BYTES}),
        }
        drives = [
            *file_disk(system_image(), boot=True, readonly=True),
            *file_disk(compile_writer(tmp_path), readonly=True),
            *disks["overlay"],
            *disks["raw"],
        ]
        with Guest(drives, writer_script(list(disks))) as guest:
            assassin = Assassin(appliance, guest, random.Random(SEED))
            guest.wait_for("begun", BOOT_TIMEOUT_S)
            try:
                assassin.play(ROUNDS)
            finally:
                print("\n".join(pause_table(assassin.pauses())))
            guest.send("stop")
            guest.finish(FINAL_TIMEOUT_S)
    found = verdicts(guest.console)
    for name, verdict in found.items():
        print(name, verdict)
    assert set(found) == set(disks)
    assert faults(guest.console) == []
    for verdict in found.values():
        assert (verdict.errors, verdict.lost, verdict.wrong) == (0, 0, 0)
        assert verdict.acknowledged > ROUNDS
        assert verdict.synced > 0


def _attached(appliance: Appliance, request: dict[str, Any]) -> list[str]:
    """Create and attach a disk; return QEMU's arguments, which tell the guest of every error."""
    status, disk = appliance.request("POST", "/v1/disks", request)
    assert status == 201, disk
    path = f"/v1/disks/{disk['uuid']}/attachments"
    status, attachment = appliance.request("POST", path, {"instance": disk["uuid"]})
    assert status == 201, attachment
    arguments: list[str] = attachment["qemu_args"]
    return [word.replace("werror=stop,rerror=stop", "werror=report,rerror=report")
            for word in arguments]  # fmt: skip
