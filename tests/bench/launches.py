"""Clone and attach of a cached image, twenty at a time."""

import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from support.appliance import Appliance
from support.publishing import publish_image

from bench.result import Result

LAUNCHES = 200
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
            times = list(pool.map(launch, range(LAUNCHES)))
        good = sorted(duration for duration in times if duration is not None)
        yield Result("launches that succeed, 20 at a time", "ratio", [len(good) / LAUNCHES], 1.0)
        p95 = good[int(len(good) * 0.95) - 1]
        yield Result("clone + attach, 20 at a time, p95", "ms", [p95], 50, at_least=False)
