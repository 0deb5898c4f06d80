"""Import of a local raw image, and reading an image through FUSE."""

import os
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

from support.appliance import Appliance
from support.publishing import publish_image

from bench.result import Result

IMAGE_BYTES = 512 * 1024**2


def measure(directory: Path, samples: int) -> Iterable[Result]:
    """Measure import against `sha256sum && cp`, and 1 MiB reads against the plain file."""
    published = publish_image(directory / "published", IMAGE_BYTES)
    identifier = published.identifier
    with Appliance(
        directory / "appliance", endpoint=published.endpoint, fingerprint=published.fingerprint
    ) as appliance:
        ratios: list[float] = []
        for _ in range(samples):
            yardstick_s = _seconds(
                f"sha256sum {published.image} && cp {published.image} {directory}/copy"
            )
            os.unlink(directory / "copy")
            if ratios:
                appliance.json("image", "rm", identifier)
            started = time.monotonic()
            appliance.json("image", "fetch", identifier)
            ratios.append(yardstick_s / (time.monotonic() - started))
        yield Result("import of a raw image / sha256sum && cp", "ratio", ratios, 0.8)
        block_file = appliance.run_dir / "blocks" / "images" / identifier
        cold, warm = [], []
        for _ in range(samples):
            plain_s = _read_seconds(published.image, cold=True)
            cold.append(plain_s / _read_seconds(block_file, cold=True))
            plain_s = _read_seconds(published.image, cold=False)
            warm.append(plain_s / _read_seconds(block_file, cold=False))
        yield Result("image through FUSE, 1 MiB sequential, cold / plain", "ratio", cold, 0.8)
        yield Result("image through FUSE, 1 MiB sequential, warm / plain", "ratio", warm, 0.95)


def _read_seconds(path: Path, *, cold: bool) -> float:
    if cold:
        subprocess.run(["sync"], check=True)
        Path("/proc/sys/vm/drop_caches").write_text("3")
    return _seconds(f"dd if={path} of=/dev/null bs=1M")


def _seconds(command: str) -> float:
    started = time.monotonic()
    subprocess.run(["sh", "-c", command], check=True, capture_output=True)
    return time.monotonic() - started
