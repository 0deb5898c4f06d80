"""Fifty launchers want one disk at the same moment, through the real API.

`make test` plays three races; `make crash` what ATTACH_RACES says.
"""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.appliance import Appliance

RACES = int(os.environ.get("ATTACH_RACES", "3"))
LAUNCHERS = 50

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(120 + 10 * RACES)]


def test_one_launcher_gets_the_disk(tmp_path: Path) -> None:
    """Exactly one attach succeeds, the others get 409 that names its instance, every time."""
    print(f"ATTACH_RACES={RACES}")
    barrier = threading.Barrier(LAUNCHERS)
    with (
        Appliance(tmp_path / "appliance", endpoint="http://127.0.0.1:9") as appliance,
        ThreadPoolExecutor(LAUNCHERS) as launchers,
    ):
        status, disk = appliance.request("POST", "/v1/disks", {"size_bytes": 1024**2})
        assert status == 201, disk
        path = f"/v1/disks/{disk['uuid']}/attachments"

        def attach(number: int) -> tuple[int, Any]:
            barrier.wait()
            return appliance.request("POST", path, {"instance": f"vm{number:02}"})

        winners = set()
        for _ in range(RACES):
            answers = list(launchers.map(attach, range(LAUNCHERS)))
            won = [body for status, body in answers if status == 201]
            assert len(won) == 1, answers
            holder = won[0]["instance"]
            winners.add(holder)
            for status, body in answers:
                if status != 201:
                    assert (status, body["code"]) == (409, "disk-attached"), body
                    assert holder in body["detail"]
            _, held = appliance.request("GET", path)
            assert [item["id"] for item in held["attachments"]] == [won[0]["id"]]
            assert appliance.request("DELETE", f"{path}/{won[0]['id']}")[0] == 204
        print(f"winners: {sorted(winners)}")
