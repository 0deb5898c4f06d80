"""The overview of a host with many disks: the document, and the page that people see."""

import time
import uuid
from collections.abc import Iterable
from pathlib import Path

from support.appliance import Appliance

from bench.listing import DISKS, insert_disks
from bench.result import Result

REQUESTS = 40
DOCUMENT_MS_MAX = 30
PAGE_MS_MAX = 300


def measure(directory: Path, samples: int) -> Iterable[Result]:
    """Measure both with the rows and the folders of many disks put in straight."""
    with Appliance(directory / "appliance", endpoint="file:///nowhere") as appliance:
        uuids = [str(uuid.uuid4()) for _ in range(DISKS)]
        for name in uuids:
            folder = appliance.state_dir / "disks" / name
            folder.mkdir(parents=True)
            (folder / "data").touch()
        insert_disks(appliance, uuids)
        for name, path, limit_ms in (
            ("document", "/v1/overview", DOCUMENT_MS_MAX),
            ("page", "/", PAGE_MS_MAX),
        ):
            p95s = []
            for _ in range(samples):
                times = sorted(_milliseconds(appliance, path) for _ in range(REQUESTS))
                p95s.append(times[int(REQUESTS * 0.95) - 1])
            yield Result(
                f"overview {name} with {DISKS} disks, p95", "ms", p95s, limit_ms, at_least=False
            )


def _milliseconds(appliance: Appliance, path: str) -> float:
    started = time.monotonic()
    status, _ = appliance.exchange("GET", path)
    assert status == 200, (path, status)
    return (time.monotonic() - started) * 1000
