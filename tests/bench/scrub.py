"""Guests' reads while the scrubber runs, against the same reads while it is paused."""

from collections.abc import Iterable
from pathlib import Path

from support.appliance import Appliance
from support.publishing import publish_image

from bench.iscsi import Load, attached, rate
from bench.result import Result

IMAGE_BYTES = 1024**3
LOADS = (
    Load("4 KiB d1 read", 4096, 1, False, 5000),
    Load("4 KiB d32 read", 4096, 32, False, 20000),
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
            for sample in range(samples):
                # in turn the one or the other is first: a machine's speed drifts
                rates = {
                    action: _rate_while(appliance, action, url, load)
                    for action in (("--pause", "--now") if sample % 2 else ("--now", "--pause"))
                }
                ratios.append(rates["--now"] / rates["--pause"])
            yield Result(
                f"overlay disk, {load.name}, scrub running / paused", "ratio", ratios, 0.95
            )


def _rate_while(appliance: Appliance, action: str, url: str, load: Load) -> float:
    """Return the rate while the scrubber runs (`--now`) or does not (`--pause`)."""
    appliance.json("cache", "scrub", action)
    found = rate(url, load)
    state = appliance.json("cache", "status")["scrub"]["state"]
    if state != {"--now": "running", "--pause": "paused"}[action]:
        raise RuntimeError("the pass ended within a measurement; make the image larger")
    return found
