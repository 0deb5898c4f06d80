"""Sixteen launches of one image that is not cached, at once, against one launch.

A launch is one request and a guest that reads what a boot reads. Sixteen emulated machines are more
than a small host can run, so three are real ones, in a run of their own; all others are initiators
that read, in order, the boot set that a real boot has left. What each costs the origin is counted in
its log.
"""

import json
import subprocess
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from stratodemo.guest import Guest
from support.appliance import Appliance
from support.nginx import Nginx

from bench.debian import FIRST_LINE, LAST_LINE
from bench.lazy import MEMORY_MIB, Site, boot, published_debian
from bench.result import Result

LAUNCHES = 16
MACHINES = 3
_ROUNDS_MAX = 3
_BOOT_TIMEOUT_S = 900.0
_CHUNK_BYTES = 512 * 1024
_READ_BYTES = 64 * 1024


def measure(directory: Path, samples: int) -> Iterable[Result]:
    """Launch one, then sixteen, in turn; then three machines and thirteen initiators."""
    alone: list[float] = []
    last: list[float] = []
    most: list[float] = []
    with published_debian(directory) as site:
        boot(directory / "learning", site, learn=True)
        pattern = json.loads(site.bootset.read_text())["indexes"]
        site.bootset.unlink()
        for number in range(min(samples, _ROUNDS_MAX)):
            alone.append(max(_launch(directory / f"alone{number}", site, pattern, 1)))
            before = _chunks_sent(site.nginx)
            last.append(max(_launch(directory / f"crowd{number}", site, pattern, LAUNCHES)))
            most.append(max((_chunks_sent(site.nginx) - before).values()))
        before = _chunks_sent(site.nginx)
        _launch(directory / "machines", site, pattern, LAUNCHES - MACHINES, machines=MACHINES)
        machines = _chunks_sent(site.nginx) - before
    ratios = [sixteen / one for one, sixteen in zip(alone, last, strict=True)]
    yield Result("16 launches at once: last / one launch", "ratio", ratios, 1.3, at_least=False)
    yield Result("one launch: boot set read", "s", alone)
    yield Result("16 launches at once: last boot set read", "s", last)
    yield Result(
        "16 launches at once: most often a chunk left the origin", "times", most, 1, at_least=False
    )
    yield Result(
        f"{MACHINES} machines and {LAUNCHES - MACHINES} initiators: most often a chunk left the origin",
        "times", [max(machines.values())], 1, at_least=False,
    )  # fmt: skip


def _launch(
    root: Path, site: Site, pattern: list[int], readers: int, *, machines: int = 0
) -> list[float]:
    """Launch all at once on a host that has nothing; return when each reader had its boot set."""
    published = site.indexed
    with (
        Appliance(
            root, endpoint=published.endpoint, fingerprint=published.fingerprint
        ) as appliance,
        ThreadPoolExecutor(readers + machines) as pool,
    ):
        started = time.monotonic()

        def launch(instance: str) -> Any:
            body = {"reference": published.identifier, "instance": instance}
            status, answer = appliance.request("POST", "/v1/launches?wait=60", body)
            while status == 202:
                status, answer = appliance.request("GET", f"/v1/operations/{answer['id']}?wait=60")
                assert answer["state"] in ("pending", "running", "done"), answer
                if answer["state"] == "done":
                    return appliance.request("GET", f"/v1/launches/{instance}")[1]
                status = 202
            assert status == 201, answer
            return answer

        def read(number: int) -> float:
            url = launch(f"reader{number}")["boot"]["iscsi_url"]
            subprocess.run(
                ["qemu-io", "-r", "-f", "raw", url], input=_reads(pattern),
                check=True, capture_output=True, text=True,
            )  # fmt: skip
            return time.monotonic() - started

        def run(number: int) -> None:
            arguments = launch(f"machine{number}")["qemu_args"]
            with Guest(arguments, "", memory_mib=MEMORY_MIB) as guest:
                guest.line_time(FIRST_LINE, _BOOT_TIMEOUT_S)
                guest.line_time(LAST_LINE, _BOOT_TIMEOUT_S)

        booting = [pool.submit(run, number) for number in range(machines)]
        reading = [pool.submit(read, number) for number in range(readers)]
        for machine in booting:
            machine.result()
        return [reader.result() for reader in reading]


def _reads(pattern: list[int]) -> str:
    """Return qemu-io's commands: two reads of each chunk."""
    lines = [
        f"read -q {index * _CHUNK_BYTES + offset} {_READ_BYTES}"
        for index in pattern
        for offset in (0, _CHUNK_BYTES // 2)
    ]
    return "\n".join([*lines, "quit", ""])


def _chunks_sent(nginx: Nginx) -> Counter[str]:
    """Return how often each chunk left the origin, from its store or as part of the raw image."""
    sent = nginx.chunk_requests()
    for asked in nginx.requests():
        if asked.status == 206 and asked.path == "/image":
            places = range(asked.start // _CHUNK_BYTES, -(-asked.end // _CHUNK_BYTES))
            sent.update(f"range {place}" for place in places)
    return sent
