"""Guests' reads while the scrubber runs, against the same reads while it is paused."""

from collections.abc import Iterable
from pathlib import Path

from support.appliance import Appliance
from support.publishing import publish_image

from bench.iscsi import Load, attached, rate
from bench.result import Result

IMAGE_BYTES = 512 * 1024**2
LOADS = (
    Load("4 KiB d1 read", 4096, 1, False, 1500),
    Load("4 KiB d32 read", 4096, 32, False, 5000),
)


def measure(directory: Path, samples: int) -> Iterable[Result]:
    """Read a clone over iSCSI, which reads the image's chunks, with and without the scrubber."""
    published = publish_image(directory / "published", IMAGE_BYTES)
    with Appliance(
        directory / "appliance", endpoint=published.endpoint, fingerprint=published.fingerprint
    ) as appliance:
        url = attached(appliance, "--reference", published.identifier)
        for load in LOADS:
            rate(url, load)
            ratios = []
            for _ in range(samples):
                appliance.json("cache", "scrub", "--pause")
                quiet = rate(url, load)
                appliance.json("cache", "scrub", "--now")
                scrubbed = rate(url, load)
                state = appliance.json("cache", "status")["scrub"]["state"]
                if state != "running":
                    raise RuntimeError("the pass ended within a measurement; make the image larger")
                ratios.append(scrubbed / quiet)
            yield Result(
                f"overlay disk, {load.name}, scrub running / paused", "ratio", ratios, 0.95
            )
