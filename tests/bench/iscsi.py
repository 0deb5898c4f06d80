"""Raw and overlay disks over iSCSI against tgt on a plain file: the six figures."""

import contextlib
import os
import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from support.appliance import Appliance, free_port
from support.publishing import publish_image

from bench.result import Result

DISK_BYTES = 512 * 1024**2


@dataclass(frozen=True)
class Load:
    """One pattern of requests."""

    name: str
    size_bytes: int
    depth: int
    write: bool
    count: int


LOADS = tuple(
    Load(f"{label} {'write' if write else 'read'}", size_bytes, depth, write, count)
    for write in (True, False)
    for label, size_bytes, depth, count in (
        ("4 KiB d1", 4096, 1, 20000),
        ("4 KiB d32", 4096, 32, 60000),
        ("1 MiB d4", 1024**2, 4, 1024),
    )
)
GOALS = {"raw": 0.97, "overlay": 0.6}


def measure(directory: Path, samples: int) -> Iterable[Result]:
    """Measure both kinds of disk; their blocks are all written before."""
    reference = publish_image(directory / "published", DISK_BYTES)
    with (
        Appliance(
            directory / "appliance", endpoint=reference.endpoint, fingerprint=reference.fingerprint
        ) as appliance,
        _plain_target(directory) as plain_url,
    ):
        urls = {
            "raw": attached(appliance, "--size", str(DISK_BYTES)),
            "overlay": attached(appliance, "--reference", reference.identifier),
        }
        for url in (plain_url, *urls.values()):
            _fill(url)
        for load in LOADS:
            rates: dict[str, list[float]] = {kind: [] for kind in urls}
            for _ in range(samples):
                for kind, url in urls.items():
                    plain = rate(plain_url, load)
                    rates[kind].append(rate(url, load) / plain)
            for kind, ratios in rates.items():
                yield Result(f"{kind} disk, {load.name} / tgt plain", "ratio", ratios, GOALS[kind])


def attached(appliance: Appliance, *arguments: str) -> str:
    """Make a disk and attach it; return its URL."""
    disk = appliance.json("disk", "create", *arguments)
    attachment = appliance.json("disk", "attach", disk["uuid"], "--instance", disk["uuid"])
    url: str = attachment["iscsi_url"]
    return url


@contextlib.contextmanager
def _plain_target(directory: Path) -> Iterator[str]:
    """Serve a plain file by a bare tgtd, set up by tgt's own tool."""
    backing, port = directory / "plain", free_port()
    environment = {**os.environ, "TGT_IPC_SOCKET": str(directory / "control")}
    with backing.open("wb") as file:
        file.truncate(DISK_BYTES)
    daemon = subprocess.Popen(
        ["tgtd", "-f", "--iscsi", f"portal=127.0.0.1:{port}"],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    name = "iqn.2026-11.example:plain"
    steps = (
        "--op new --mode target --tid 1 -T " + name,
        f"--op new --mode logicalunit --tid 1 --lun 1 -b {backing}",
        "--op bind --mode target --tid 1 -I ALL",
    )
    try:
        while subprocess.run(
            ["tgtadm", "--op", "show", "--mode", "sys"],
            env=environment, check=False, capture_output=True,
        ).returncode:  # fmt: skip
            if daemon.poll() is not None:
                raise RuntimeError("tgtd did not start")
        for step in steps:
            subprocess.run(["tgtadm", "--lld", "iscsi", *step.split()], env=environment, check=True)
        yield f"iscsi://127.0.0.1:{port}/{name}/1"
    finally:
        daemon.kill()
        daemon.wait()


def _fill(url: str) -> None:
    rate(url, Load("fill", 1024**2, 4, True, DISK_BYTES // 1024**2))


def rate(url: str, load: Load) -> float:
    """Return requests per second, as `qemu-img bench` counts them."""
    command = [
        "qemu-img", "bench", "-f", "raw", "-t", "none", "-c", str(load.count),
        "-d", str(load.depth), "-s", str(load.size_bytes), "-S", str(load.size_bytes),
        *(["-w", "--pattern=90"] if load.write else []), url,
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = re.search(r"completed in ([0-9.]+) seconds", done.stdout)
    assert found is not None, done.stdout
    return load.count / float(found.group(1))
