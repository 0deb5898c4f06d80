"""A cold launch of a 2 GiB image from an origin limited to 100 Mbit/s, against a full download.

The image is the demonstration's bootable one, followed by bytes that do not compress. Time counts
from the request for the launch to the guest's first report from user space, under emulation.
"""

import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from stratodemo.guest import Guest
from support.appliance import Appliance
from support.guests import system_image
from support.nginx import Nginx
from support.publishing import Published, publish_file
from support.throttle import Throttle

from bench.result import Result

IMAGE_BYTES = int(os.environ.get("BENCH_LAZY_BYTES", str(2 * 1024**3)))
LINK_BYTES_PER_S = 100e6 / 8
_SCRIPT = "report done yes\n"
_BOOT_TIMEOUT_S = 900.0
_LEARNING_S = 12.0
"""Until what was read has been written down."""


@dataclass(frozen=True)
class _Boot:
    seconds: float
    """From the request to the guest's first line from user space."""
    moved_bytes: int
    """Over the link until then."""


def measure(directory: Path, samples: int) -> Iterable[Result]:
    """Boot once after a full download, and lazily without and with a boot set."""
    folder = directory / "published"
    folder.mkdir()
    image = _large_image(folder / "image")
    with (
        Nginx(directory / "nginx", folder) as nginx,
        Throttle(nginx.port, LINK_BYTES_PER_S) as link,
    ):
        location = [f"{link.url}/image"]
        plain = publish_file(folder / "plain", image, locations=location)
        indexed = publish_file(folder, image, locations=location, index_url=link.url)
        # the raw location alone, in ranges: what does not compress gains nothing from a store
        shutil.rmtree(folder / "image.castr")
        full = _boot(directory / "full", plain, link, whole=True)
        lazy: list[_Boot] = []
        learned: list[_Boot] = []
        for number in range(max(1, samples // 2)):
            bootset = folder / "image.bootset"
            bootset.unlink(missing_ok=True)
            lazy.append(_boot(directory / f"lazy{number}", indexed, link, learn=bootset))
            learned.append(_boot(directory / f"learned{number}", indexed, link))
    for name, boots in (("cold launch", lazy), ("cold launch, boot set known", learned)):
        faster = [full.seconds / boot.seconds for boot in boots]
        yield Result(f"{name} / full download, then boot", "x sooner", faster, 10)
        moved = [boot.moved_bytes / IMAGE_BYTES for boot in boots]
        yield Result(f"{name}, bytes moved", "of the image", moved, 0.1, at_least=False)
        yield Result(
            f"{name}, to user space", "s", [boot.seconds for boot in boots], full.seconds / 10,
            at_least=False,
        )  # fmt: skip
    yield Result("full download, then boot", "s", [full.seconds], full.seconds, at_least=False)


def _large_image(path: Path) -> Path:
    shutil.copyfile(system_image(), path)
    with path.open("r+b") as file:
        start = file.seek(0, os.SEEK_END)
        for _ in range(start, IMAGE_BYTES, 1024**2):
            file.write(os.urandom(1024**2))
        file.truncate(IMAGE_BYTES)
    return path


def _boot(
    root: Path, published: Published, link: Throttle, *, whole: bool = False,
    learn: Path | None = None,
) -> _Boot:  # fmt: skip
    """Boot on a host of its own that has nothing cached."""
    with Appliance(
        root, endpoint=published.endpoint, fingerprint=published.fingerprint
    ) as appliance:
        carried = link.carried_bytes
        started = time.monotonic()
        if whole:
            assert (
                appliance.run("image", "fetch", published.identifier, timeout_s=900).returncode == 0
            )
        launched = appliance.json("launch", published.identifier, "--instance", "vm")
        with Guest(launched["qemu_args"], _SCRIPT) as guest:
            guest.report_time("up", _BOOT_TIMEOUT_S)
            boot = _Boot(time.monotonic() - started, link.carried_bytes - carried)
            guest.kill()
        if learn is not None:
            time.sleep(_LEARNING_S)
            appliance.run("halt", "vm")
            assert (
                appliance.run(
                    "image", "bootset", "export", published.identifier, str(learn)
                ).returncode
                == 0
            )
    shutil.rmtree(root, ignore_errors=True)
    return boot
