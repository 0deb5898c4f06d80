"""Launches, snapshots, rollbacks and saves of an appliance whose state is in an XFS pool."""

import contextlib
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from support.appliance import Appliance
from support.publishing import publish_image

from bench.result import Result

POOL_BYTES = 32 * 1024**3
IMAGE_BYTES = 64 * 1024**2
SAVED_BYTES = 512 * 1024**2
LAUNCHES = 200
WIDTH = 20
CHAIN_LENGTH = 50
SNAPSHOT_SAMPLES = 40
BLOCK_BYTES = 4096
DISK_SIZES = {"64 MiB": 64 * 1024**2, "2 GiB": 2 * 1024**3}


def measure(directory: Path, samples: int) -> Iterable[Result]:
    """Measure all of it; each launch, snapshot and rollback is one request and its answer."""
    reference = publish_image(directory / "published", IMAGE_BYTES)
    appliance = Appliance(
        directory / "appliance", endpoint=reference.endpoint, fingerprint=reference.fingerprint
    )
    with _pool(appliance), appliance:
        appliance.json("image", "fetch", reference.identifier)
        yield from _clones(appliance, reference.identifier, samples)
        yield from _launches(appliance, reference.identifier, samples)
        for size, size_bytes in DISK_SIZES.items():
            yield from _snapshots(appliance, reference.identifier, size, size_bytes)


def measure_saves(directory: Path, samples: int) -> Iterable[Result]:
    """Measure what saving a clone adds to the cache."""
    reference = publish_image(directory / "published", IMAGE_BYTES)
    appliance = Appliance(
        directory / "appliance", endpoint=reference.endpoint, fingerprint=reference.fingerprint
    )
    with _pool(appliance), appliance:
        yield from _saves(appliance, reference.identifier, samples)


@contextlib.contextmanager
def _pool(appliance: Appliance) -> Iterator[None]:
    made = appliance.json("pool", "create", "--size", str(POOL_BYTES), "--sparse")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(appliance.state_dir)], check=False, capture_output=True)
        Path(made["path"]).unlink(missing_ok=True)
        shutil.rmtree(appliance.state_dir, ignore_errors=True)


def _clones(appliance: Appliance, reference: str, samples: int) -> Iterable[Result]:
    """Clones alone: disks that nobody attaches."""
    p95s, shares = [], []
    for _ in range(samples):

        def clone(_: int) -> tuple[float | None, Any]:
            return _timed(appliance, "POST", "/v1/disks", {"reference": reference})

        with ThreadPoolExecutor(WIDTH) as pool:
            made = list(pool.map(clone, range(LAUNCHES)))
        good = [duration for duration, _ in made if duration is not None]
        shares.append(len(good) / LAUNCHES)
        p95s.append(_p95(good))
        for _, disk in made:
            appliance.request("DELETE", f"/v1/disks/{disk['uuid']}")
    yield Result("pool: clones that succeed, 20 at a time", "ratio", shares, 1.0)
    yield Result("pool: clone, 20 at a time, p95", "ms", p95s, 50, at_least=False)


def _launches(appliance: Appliance, reference: str, samples: int) -> Iterable[Result]:
    p95s, serial, shares, costs = [], [], [], []
    for sample in range(samples):

        def launch(number: int, sample: int = sample) -> float | None:
            body = {"reference": reference, "instance": f"vm{sample}-{number}"}
            return _timed(appliance, "POST", "/v1/launches", body)[0]

        alone = [launch(number) for number in range(LAUNCHES, LAUNCHES + 10)]
        serial.append(_p95([duration for duration in alone if duration is not None]))
        before_s = _processor_s(appliance)
        with ThreadPoolExecutor(WIDTH) as pool:
            times = list(pool.map(launch, range(LAUNCHES)))
        costs.append((_processor_s(appliance) - before_s) * 1000 / LAUNCHES)
        good = [duration for duration in times if duration is not None]
        shares.append(len(good) / LAUNCHES)
        p95s.append(_p95(good))
        for number in range(LAUNCHES + 10):
            appliance.request("DELETE", f"/v1/launches/vm{sample}-{number}")
    yield Result("pool: launches that succeed, 20 at a time", "ratio", shares, 1.0)
    yield Result("pool: clone + attach, 20 at a time, p95", "ms", p95s, 50, at_least=False)
    yield Result("pool: clone + attach, processor time of one", "ms", costs, 4, at_least=False)
    yield Result("pool: clone + attach, one at a time, p95", "ms", serial, 50, at_least=False)


def _snapshots(
    appliance: Appliance, reference: str, size: str, size_bytes: int
) -> Iterable[Result]:
    for form in ("clone", "blank disk"):
        content = {"reference": reference} if form == "clone" else {}
        disk = appliance.request(
            "POST", "/v1/disks", {"size_bytes": size_bytes, "kind": "data", **content}
        )[1]
        path = f"/v1/disks/{disk['uuid']}"
        url = _attach(appliance, disk["uuid"])
        times: list[float] = []
        identifiers: list[str] = []
        for number in range(SNAPSHOT_SAMPLES + CHAIN_LENGTH):
            _write(url, random.Random(number).sample(range(IMAGE_BYTES // BLOCK_BYTES), 4))
            duration, made = _timed(appliance, "POST", f"{path}/snapshots", {})
            assert duration is not None, made
            times.append(duration)
            identifiers.append(made["id"])
            _settle(appliance, path)
        first, last = times[:SNAPSHOT_SAMPLES], times[-SNAPSHOT_SAMPLES:]
        name = f"pool: snapshot, {form}, {size}"
        yield Result(f"{name}, p95 of the first 40", "ms", [_p95(first)], 100, at_least=False)
        yield Result(f"{name}, p95 after 50", "ms", [_p95(last)], 100, at_least=False)
        _detach(appliance, disk["uuid"])
        back = []
        for identifier in identifiers[-SNAPSHOT_SAMPLES:]:
            duration, answer = _timed(
                appliance, "POST", f"{path}/snapshots/{identifier}/rollback", {}
            )
            assert duration is not None, answer
            back.append(duration)
        name = f"pool: rollback, {form}, {size}, p95 after 90 snapshots"
        yield Result(name, "ms", [_p95(back)], 100, at_least=False)
        appliance.json("disk", "rm", disk["uuid"], "--snapshots")


def _saves(appliance: Appliance, reference: str, samples: int) -> Iterable[Result]:
    """Save a clone of which 1 % of the blocks were changed, in one place and everywhere.

    Chunks are 512 KiB: blocks that lie scattered touch a chunk each, whatever is done.
    """
    blocks = SAVED_BYTES // BLOCK_BYTES
    changed = blocks // 100
    for name, goal in (("in one place", 1.5), ("scattered", 100.0)):
        ratios = []
        for sample in range(samples):
            chance = random.Random(f"{name} {sample}")
            start = chance.randrange(blocks - changed)
            places = list(range(start, start + changed))
            if name == "scattered":
                places = chance.sample(range(blocks), changed)
            disk = appliance.json(
                "disk", "create", "--reference", reference, "--size", str(SAVED_BYTES)
            )["uuid"]
            url = _attach(appliance, disk)
            _write(url, places)
            before = _chunk_bytes(appliance)
            appliance.json("disk", "save", disk, "--title", f"{name} {sample}")
            ratios.append((_chunk_bytes(appliance) - before) / (changed * BLOCK_BYTES))
            _detach(appliance, disk)
            appliance.json("disk", "rm", disk)
        yield Result(
            f"pool: save, 1 % changed {name}: new chunk bytes / changed bytes", "ratio", ratios,
            goal, at_least=False,
        )  # fmt: skip


def _timed(appliance: Appliance, method: str, path: str, body: Any) -> tuple[float | None, Any]:
    """Return the milliseconds until the answer that has the thing done, or None, and the answer."""
    started = time.monotonic()
    status, answer = appliance.request(method, path, body)
    duration_ms = (time.monotonic() - started) * 1000
    return (duration_ms if status in (200, 201, 204) else None), answer


def _processor_s(appliance: Appliance) -> float:
    """Return the processor time that we and all processes of the appliance have taken.

    Unlike durations it is much the same whoever else uses the machine.
    """
    own = os.times()
    ticks = 0
    for pid in appliance.pids():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # utime, stime: proc(5)
    return own.user + own.system + ticks / os.sysconf("SC_CLK_TCK")


def _settle(appliance: Appliance, path: str) -> None:
    """Wait for the end of absorbing, which the next snapshot would wait for."""
    while any(
        item["state"] != "available"
        for item in appliance.request("GET", f"{path}/snapshots")[1]["snapshots"]
    ):
        time.sleep(0.02)


def _attach(appliance: Appliance, uuid: str) -> str:
    url: str = appliance.json("disk", "attach", uuid, "--instance", uuid)["iscsi_url"]
    return url


def _detach(appliance: Appliance, uuid: str) -> None:
    appliance.json("disk", "detach", uuid)


def _write(url: str, blocks: list[int]) -> None:
    """Write random bytes to blocks."""
    runs: list[tuple[int, int]] = []
    for block in sorted(blocks):
        if runs and sum(runs[-1]) == block:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((block, 1))
    with tempfile.NamedTemporaryFile() as file:
        file.write(os.urandom(max(length for _, length in runs) * BLOCK_BYTES))
        file.flush()
        commands = [
            f"write -q -s {file.name} {start * BLOCK_BYTES} {length * BLOCK_BYTES}"
            for start, length in runs
        ]
        subprocess.run(
            ["qemu-io", "-f", "raw", url], input="\n".join([*commands, "flush", "quit", ""]),
            check=True, capture_output=True, text=True,
        )  # fmt: skip


def _chunk_bytes(appliance: Appliance) -> int:
    return sum(
        os.stat(Path(folder) / name).st_size
        for folder, _, names in os.walk(appliance.state_dir / "chunks")
        for name in names
    )


def _p95(durations: list[float]) -> float:
    return sorted(durations)[max(0, int(len(durations) * 0.95) - 1)]
