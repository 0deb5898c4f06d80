"""Files of the cache that rot while guests boot over iSCSI and fio verifies through FUSE.

The system image comes from a file; the data image, whose every block fio knows, from a web server of
which one way corrupts, cuts and refuses. Only `make crash` runs it, as it takes a quarter of an hour,
and hurts CRASH_FAULTS files. The seed is printed; give it back as CRASH_SEED to choose the same
faults again.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from stratodemo.guest import Guest
from support.appliance import Appliance
from support.damage import DAMAGES, INDEX_DAMAGES, damage
from support.faulty_proxy import FaultyProxy, faulty_proxy
from support.guests import system_image
from support.monitor import Monitor
from support.nginx import Nginx
from support.publishing import Published, publish_file

FAULTS = int(os.environ.get("CRASH_FAULTS", "1000"))
SEED = int(os.environ.get("CRASH_SEED", str(random.SystemRandom().randrange(2**32))))
DATA_BYTES = 24 * 1024**2
KILL_EVERY = 60
PAUSE_S = 0.5
PROXY_FAULT_RATE = 0.3
FIO_ROUND_S = 3
TIMEOUT_S = 1500
_LATE = "is still being fetched again"

pytestmark = [
    pytest.mark.root, pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(3600 + 4 * FAULTS),
]  # fmt: skip

SCRIPT = """
data=$(disk 1)
report digest "$(dd if="$data" bs=1M iflag=direct 2>/dev/null | sha256sum | cut -d' ' -f1)"
dmesg | grep -c 'I/O error' > /tmp/errors
report errors "$(cat /tmp/errors)"
"""


@dataclass
class Readers:
    """What guests and fio do, each in a thread, until the files no longer rot."""

    appliance: Appliance
    system: Published
    data: Published
    ended: threading.Event = field(default_factory=threading.Event)
    boots: int = 0
    verified_bytes: int = 0
    pauses: int = 0
    """How often a guest was paused, and fio refused, because a repair took longer than 20 s."""
    failures: list[str] = field(default_factory=list)

    def boot(self) -> None:
        """Boot clones of the system image; each guest reads all of the data image."""
        while not self.ended.is_set() and not self.failures:
            try:
                self._boot_once(f"vm{self.boots}")
            except Exception as error:  # noqa: BLE001 -- the test's own thread judges it
                self.failures.append(f"guest {self.boots}: {error!r}")
            self.boots += 1

    def _boot_once(self, instance: str) -> None:
        launched = self.appliance.json(
            "launch", self.system.identifier, "--instance", instance,
            "--readonly-disk", self.data.identifier,
        )  # fmt: skip
        control = self.appliance.root / f"{instance}.qmp"
        arguments = [*launched["qemu_args"], "-qmp", f"unix:{control},server=on,wait=off"]
        with Guest(arguments, SCRIPT) as guest:
            operator = threading.Thread(target=self._let_go_on, args=(control,))
            operator.start()
            reports = guest.finish(TIMEOUT_S)
            operator.join()
        if (reports["digest"], reports["errors"]) != (self.data.sha256, "0"):
            self.failures.append(f"guest {instance} saw {reports}")
        halted = self.appliance.run("halt", instance)
        assert halted.returncode == 0, halted.stderr

    def _let_go_on(self, control: Path) -> None:
        """Do what an operator does with a guest that is paused by an I/O error, until it ends."""
        while not control.exists():
            time.sleep(0.1)
        monitor = Monitor(control)
        with contextlib.closing(monitor), contextlib.suppress(OSError, ValueError):
            while True:
                if monitor.ask("query-status")["status"] == "io-error":
                    self.pauses += 1
                    monitor.ask("cont")
                time.sleep(0.5)

    def verify(self, path: Path) -> None:
        """Let fio read a file at random, past the page cache, and verify every block of it."""
        while not self.ended.is_set() and not self.failures:
            done = subprocess.run(
                ["fio", "--name=verify", f"--filename={path}", f"--size={DATA_BYTES}", "--bs=4k",
                 "--rw=randread", "--ioengine=psync", "--direct=1", "--readonly", "--thread",
                 "--numjobs=2", "--group_reporting", "--verify=crc32c", "--verify_fatal=1",
                 "--time_based", f"--runtime={FIO_ROUND_S}", "--output-format=json"],
                check=False, capture_output=True, text=True, timeout=TIMEOUT_S,
            )  # fmt: skip
            if done.returncode != 0 and "Input/output error" in done.stderr + done.stdout:
                self.pauses += 1  # `_assert_only_late` says whether that was the reason
                continue
            if done.returncode != 0:
                self.failures.append(f"fio on {path.name}: {done.stdout[:800]}{done.stderr[:800]}")
                return
            report = json.loads(done.stdout[done.stdout.index("{") :])
            self.verified_bytes += report["jobs"][0]["read"]["io_bytes"]


@pytest.fixture
def data_image(tmp_path: Path) -> Path:
    """An image of blocks that fio wrote: each has its place and a checksum of itself."""
    path = tmp_path / "data"
    subprocess.run(
        ["fio", "--name=fill", f"--filename={path}", f"--size={DATA_BYTES}", "--bs=4k", "--rw=write",
         "--ioengine=psync", "--thread", "--verify=crc32c", "--do_verify=0"],
        check=True, capture_output=True,
    )  # fmt: skip
    return path


@pytest.fixture
def origin(tmp_path: Path) -> Iterator[tuple[str, FaultyProxy]]:
    """A web server's address, and a proxy before it."""
    folder = tmp_path / "published"
    folder.mkdir()
    with Nginx(tmp_path / "nginx", folder) as nginx, faulty_proxy(nginx.port) as proxy:
        yield nginx.url, proxy


def test_a_guest_boots_and_fio_verifies_while_files_rot(
    tmp_path: Path, data_image: Path, origin: tuple[str, FaultyProxy]
) -> None:
    """While chunks, manifests, seals and the index are hurt, and one of two origins lies, guests boot
    and read right bytes, fio finds every block right, and in the end all is whole again."""
    print(f"CRASH_SEED={SEED} CRASH_FAULTS={FAULTS}")
    url, proxy = origin
    folder = tmp_path / "published"
    image = folder / "data"
    data_image.rename(image)
    system = publish_file(folder, system_image())
    data = publish_file(folder, image, locations=[f"{proxy.url}/data", f"{url}/data"])
    started = time.monotonic()
    with Appliance(
        tmp_path / "appliance", endpoint=data.endpoint, fingerprint=data.fingerprint,
        extra="fetch.read_timeout_s = 2\n[scrub]\nbytes_per_s = 67108864\n",
    ) as appliance:  # fmt: skip
        for published in (system, data):
            appliance.json("image", "fetch", published.identifier)
        clone = appliance.json("disk", "create", "--reference", data.identifier)["uuid"]
        proxy.misbehave(SEED, PROXY_FAULT_RATE)
        readers = Readers(appliance, system, data)
        faults = _hurt_beside(readers, [data.identifier, clone], random.Random(SEED))
        seconds = time.monotonic() - started
        met = sum(proxy.counts.values()) - proxy.counts["none"]
        print(
            f"faults {dict(sorted(faults.items()))}; {readers.boots} guests booted, fio verified "
            f"{readers.verified_bytes >> 20} MiB, {readers.pauses} reads came late, {met} faults of the "
            f"origin, {seconds:.0f} s"
        )
        assert readers.failures == [], appliance.log.read_text()[-8000:]
        assert readers.boots and readers.verified_bytes
        _assert_only_late(appliance)
        _assert_whole(appliance, {system.identifier: system_image(), data.identifier: image})
    checked = appliance.run("cache", "check", "--repair", "--json")
    assert json.loads(checked.stdout)["leaks"] == []
    assert sum(faults.values()) == FAULTS


def _hurt_beside(readers: Readers, names: list[str], chance: random.Random) -> Counter[str]:
    """Hurt files until there were enough and a guest has booted meanwhile."""
    image, clone = names
    blocks = readers.appliance.run_dir / "blocks"
    faults: Counter[str] = Counter()
    with ExitStack() as stack:
        for work, *arguments in (
            (readers.boot,), (readers.verify, blocks / "images" / image),
            (readers.verify, blocks / "disks" / clone),
        ):  # fmt: skip
            thread = threading.Thread(target=work, args=arguments)
            thread.start()
            stack.callback(thread.join)
        stack.callback(readers.ended.set)
        while sum(faults.values()) < FAULTS and not readers.failures:
            kind = chance.choice([*DAMAGES, *INDEX_DAMAGES])
            if damage(readers.appliance.state_dir, kind, chance):
                faults[kind] += 1
                if sum(faults.values()) % KILL_EVERY == KILL_EVERY // 2:
                    _kill_blockd(readers.appliance)
            time.sleep(chance.uniform(0, PAUSE_S))
    return faults


def _kill_blockd(appliance: Appliance) -> None:
    """Let a new process begin, which trusts nothing that this one has verified."""
    for pid in appliance.pids("stratocache.fs.blockd"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _assert_only_late(appliance: Appliance) -> None:
    """Every read that failed did because its repair took longer than a reader waits."""
    lines = appliance.log.read_text().splitlines()
    assert [line for line in lines if "stratocache.fs.tree" in line and _LATE not in line] == []
    assert [line for line in lines if "chunk.lost" in line or "manifest.lost" in line] == []


def _assert_whole(appliance: Appliance, images: dict[str, Path]) -> None:
    """After a scrub nothing is lost, nothing is damaged, and images are what was published."""
    scrubbed = appliance.run("cache", "scrub", "--wait", timeout_s=TIMEOUT_S)
    assert scrubbed.returncode == 0, scrubbed.stdout
    assert appliance.json("cache", "status")["losses"] == []
    checked = appliance.run("cache", "check", "--deep", "--json")
    assert json.loads(checked.stdout)["faults"] == []
    for identifier, published in images.items():
        served = appliance.run_dir / "blocks" / "images" / identifier
        assert subprocess.run(["cmp", served, published], check=False).returncode == 0
