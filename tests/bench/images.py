"""Import of a local raw image, and reading an image through FUSE."""

import os
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

from support.appliance import Appliance
from support.publishing import Published, publish_image

from bench.result import Result

IMAGE_BYTES = 512 * 1024**2


def measure(directory: Path, samples: int) -> Iterable[Result]:
    """Measure import against `sha256sum && cp`, and 1 MiB reads against the plain file."""
    # An image for each sample: ext4 without a journal gives no inode again for minutes after it was
    # deleted and looks at each of them (recently_deleted), so a second import would pay for the first.
    images = [
        publish_image(directory / "published", IMAGE_BYTES, seed=1 + sample)
        for sample in range(samples)
    ]
    published = images[0]
    with Appliance(
        directory / "appliance", endpoint=published.endpoint, fingerprint=published.fingerprint
    ) as appliance:
        ratios = [_import_ratio(appliance, image, directory / "copy") for image in images]
        yield Result("import of a raw image / sha256sum && cp", "ratio", ratios, 0.8)
        block_file = appliance.run_dir / "blocks" / "images" / published.identifier
        cold, warm = [], []
        for _ in range(samples):
            plain_s = _read_seconds(published.image, cold=True)
            cold.append(plain_s / _read_seconds(block_file, cold=True))
            plain_s = _read_seconds(published.image, cold=False)
            warm.append(plain_s / _read_seconds(block_file, cold=False))
        yield Result("image through FUSE, 1 MiB sequential, cold / plain", "ratio", cold, 0.8)
        yield Result("image through FUSE, 1 MiB sequential, warm / plain", "ratio", warm, 0.95)


def _import_ratio(appliance: Appliance, published: Published, copy: Path) -> float:
    """Return the time of the yardstick over the time of an import, both of a file in memory."""
    os.sync()  # what others have written is nobody's to make durable
    yardstick_s = _seconds(f"sha256sum {published.image} && cp {published.image} {copy}")
    copy.unlink()
    os.sync()
    started = time.monotonic()
    appliance.json("image", "fetch", published.identifier)
    return yardstick_s / (time.monotonic() - started)


def _read_seconds(path: Path, *, cold: bool) -> float:
    if cold:
        subprocess.run(["sync"], check=True)
        Path("/proc/sys/vm/drop_caches").write_text("3")
    return _seconds(f"dd if={path} of=/dev/null bs=1M")


def _seconds(command: str) -> float:
    started = time.monotonic()
    subprocess.run(["sh", "-c", command], check=True, capture_output=True)
    return time.monotonic() - started
