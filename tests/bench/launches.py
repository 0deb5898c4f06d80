"""Clone and attach of a cached image, twenty at a time."""

import re
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from support.appliance import Appliance
from support.publishing import publish_image

from bench.result import Result

LAUNCHES = 200
MEMORY_LAUNCHES = 100
WIDTH = 20


def measure(directory: Path, samples: int) -> Iterable[Result]:
    """Measure launches through the API, from request to the answer that has the target."""
    reference = publish_image(directory / "published", 64 * 1024**2)
    with Appliance(
        directory / "appliance", endpoint=reference.endpoint, fingerprint=reference.fingerprint
    ) as appliance:
        appliance.json("image", "fetch", reference.identifier)

        def launch(number: int) -> float | None:
            started = time.monotonic()
            body = {"reference": reference.identifier, "instance": f"vm{number}"}
            status, _ = appliance.request("POST", "/v1/launches", body)
            return (time.monotonic() - started) * 1000 if status == 201 else None

        with ThreadPoolExecutor(WIDTH) as pool:
            times = list(pool.map(launch, range(MEMORY_LAUNCHES)))
            resident = _memory(appliance)
            times += pool.map(launch, range(MEMORY_LAUNCHES, LAUNCHES))
        good = sorted(duration for duration in times if duration is not None)
        yield Result("launches that succeed, 20 at a time", "ratio", [len(good) / LAUNCHES], 1.0)
        p95 = good[int(len(good) * 0.95) - 1]
        yield Result("clone + attach, 20 at a time, p95", "ms", [p95], 50, at_least=False)
        name = f"blockd with {MEMORY_LAUNCHES} attached disks"
        yield Result(f"{name}, resident", "MiB", [resident], 200, at_least=False)


def _memory(appliance: Appliance) -> float:
    """Return the memory of the `blockd` that serves, not of the spare one beside it."""
    statuses = [Path(f"/proc/{pid}/status").read_text() for pid in appliance.pids("stratocache.fs")]
    return max(_mebibytes(status, "VmRSS") for status in statuses)


def _mebibytes(status: str, field: str) -> float:
    found = re.search(rf"^{field}:\s+([0-9]+) kB$", status, re.MULTILINE)
    return int(found.group(1)) / 1024 if found else 0.0
