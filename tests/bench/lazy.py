"""A cold launch of a 2 GiB Debian from an origin limited to 100 Mbit/s, against a full download.

One nginx behind one link of that rate serves the raw image, its index and its chunk store. In every
round three hosts that have nothing launch it: one downloads the raw image first, one launches at
once, one launches at once and finds a boot set beside the index, which the one before has learned.
Time counts from the request for the launch (or for the download before it) to the first line of the
root file system's process 1, and to the end of the boot, under emulation.
"""

import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from stratodemo.guest import Guest
from support.appliance import Appliance
from support.nginx import Nginx
from support.publishing import Published, publish_file
from support.throttle import Throttle

from bench.debian import FIRST_LINE, LAST_LINE, debian_image
from bench.result import Result

IMAGE_BYTES = int(os.environ.get("BENCH_LAZY_BYTES", str(2 * 1024**3)))
LINK_BYTES_PER_S = 100e6 / 8
MEMORY_MIB = 512
_ROUNDS_MAX = 3
_KEPT_IMAGES = Path(__file__).resolve().parents[2] / "build" / "bench"
_BOOT_TIMEOUT_S = 900.0
_LEARNING_S = 6.0
"""Until what was read has been written down."""


@dataclass(frozen=True)
class Site:
    """The image as it is published, and the link to it."""

    folder: Path
    nginx: Nginx
    link: Throttle
    plain: Published
    """Its entry endorses no index: it is downloaded whole."""
    indexed: Published

    @property
    def bootset(self) -> Path:
        """Where a boot set would lie beside the index."""
        return self.folder / "image.bootset"


@dataclass(frozen=True)
class Boot:
    """One launch on a host of its own that has nothing."""

    first_line_s: float
    end_s: float
    moved_bytes: int
    """Over the link until the first line."""
    moved_to_end_bytes: int
    in_machine_s: float
    """From the start of the machine to the first line."""
    processor_s: float
    """That the machine took until then: what a busy host does not change much."""
    waited_s: float
    """That its reads waited for the origin, until the end of the boot."""


@contextmanager
def published_debian(directory: Path) -> Iterator[Site]:
    """Publish the Debian image behind the link."""
    folder = directory / "published"
    folder.mkdir()
    image = folder / "image"
    image.symlink_to(debian_image(_KEPT_IMAGES, IMAGE_BYTES))
    with (
        Nginx(directory / "nginx", folder) as nginx,
        Throttle(nginx.port, LINK_BYTES_PER_S) as link,
    ):
        location = [f"{link.url}/image"]
        plain = publish_file(folder / "plain", image, locations=location)
        indexed = publish_file(folder, image, locations=location, index_url=link.url)
        yield Site(folder, nginx, link, plain, indexed)


def measure(directory: Path, samples: int) -> Iterable[Result]:
    """Boot after a full download, and lazily without and with a boot set, in turn."""
    full: list[Boot] = []
    lazy: list[Boot] = []
    learned: list[Boot] = []
    with published_debian(directory) as site:
        for number in range(min(samples, _ROUNDS_MAX)):
            site.bootset.unlink(missing_ok=True)
            full.append(boot(directory / f"full{number}", site, whole=True))
            lazy.append(boot(directory / f"lazy{number}", site, learn=True))
            learned.append(boot(directory / f"learned{number}", site))
        shutil.rmtree(site.folder / "image.castr")
        site.bootset.unlink()
        ranges = [boot(directory / "ranges", site)]
    yield from _rows("cold launch", lazy, full)
    yield from _rows("cold launch, boot set known", learned, full)
    yield from _rows("cold launch, raw image by ranges", ranges, full[:1])
    for name, seconds in (
        ("full download, then boot: to user space", [one.first_line_s for one in full]),
        ("full download, then boot: to the end of the boot", [one.end_s for one in full]),
        ("full download, then boot: machine alone", [one.in_machine_s for one in full]),
        ("full download, then boot: its processor time", [one.processor_s for one in full]),
    ):
        yield Result(name, "s", seconds)


def _rows(name: str, boots: list[Boot], full: list[Boot]) -> Iterable[Result]:
    pairs = list(zip(full, boots, strict=True))
    faster = [one.first_line_s / other.first_line_s for one, other in pairs]
    yield Result(f"{name}: full download / this, to user space", "x", faster, 10)
    faster = [one.end_s / other.end_s for one, other in pairs]
    yield Result(f"{name}: full download / this, to the end of the boot", "x", faster)
    tenth_s = min(one.first_line_s for one in full) / 10
    seconds = [one.first_line_s for one in boots]
    yield Result(f"{name}: to user space", "s", seconds, tenth_s, at_least=False)
    seconds = [one.processor_s for one in boots]
    yield Result(f"{name}: processor time of the machine", "s", seconds)
    seconds = [one.waited_s for one in boots]
    yield Result(f"{name}: guest waited for the origin", "s", seconds)
    moved = [one.moved_bytes / IMAGE_BYTES for one in boots]
    yield Result(f"{name}: moved to user space", "of image", moved, 0.1, at_least=False)
    moved = [one.moved_to_end_bytes / IMAGE_BYTES for one in boots]
    yield Result(f"{name}: moved to the end of the boot", "of image", moved, 0.1, at_least=False)


def boot(root: Path, site: Site, *, whole: bool = False, learn: bool = False) -> Boot:
    """Boot on a host that has nothing; `learn` publishes the boot set that it has learned."""
    published = site.plain if whole else site.indexed
    with Appliance(
        root, endpoint=published.endpoint, fingerprint=published.fingerprint
    ) as appliance:
        carried = site.link.carried_bytes
        started = time.monotonic()
        if whole:
            done = appliance.run("image", "fetch", published.identifier, timeout_s=900)
            assert done.returncode == 0, done.stderr
        launched = appliance.json("launch", published.identifier, "--instance", "vm")
        with Guest(launched["qemu_args"], "", memory_mib=MEMORY_MIB) as guest:
            machine_s = time.monotonic() - started
            first_s = guest.line_time(FIRST_LINE, _BOOT_TIMEOUT_S)
            moved_bytes = site.link.carried_bytes - carried
            processor_s = _processor_s(guest.pid)
            last_s = guest.line_time(LAST_LINE, _BOOT_TIMEOUT_S)
            moved_to_end_bytes = site.link.carried_bytes - carried
            guest.kill()
        time.sleep(_LEARNING_S)
        waited_s = appliance.json("image", "show", published.identifier)["remote_wait_s"]
        if learn:
            appliance.json("halt", "vm")
            export = ["image", "bootset", "export", published.identifier, str(site.bootset)]
            done = appliance.run(*export)
            assert done.returncode == 0, done.stderr
    shutil.rmtree(root, ignore_errors=True)
    return Boot(
        machine_s + first_s, machine_s + last_s, moved_bytes, moved_to_end_bytes, first_s,
        processor_s, waited_s or 0.0,
    )  # fmt: skip


def _processor_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # proc(5)
