"""Rounds of SIGKILL and upgrades of an appliance that a guest works on, and what the guest felt."""

import contextlib
import os
import random
import signal
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stratodemo.guest import Guest

from stratocache.fs.supervisor_status import read_status
from support.appliance import Appliance
from support.guests import file_disk, system_image
from support.publishing import publish_image
from support.writer import compile_writer, progress, slow_operations, writer_script

RECOVERY_TIMEOUT_S = 60
BASE_BYTES = 12 * 1024**2
DISK_BYTES = 16 * 1024**2
_BOOT_TIMEOUT_S = 120
_FINAL_TIMEOUT_S = 120
_TOGETHER_S = 0.002
_UPGRADE_S = (0.0, 6.0)
_REST_S = (0.1, 1.2)
_AGAIN_S = (0.0, 1.5)
_AGAIN_CHANCE = 0.2

# What is killed in one round, or met by an upgrade, which comes first then. The order of those killed
# together is chosen anew each time.
VICTIMS: tuple[tuple[str, ...], ...] = (
    ("blockd",),
    ("tgtd",),
    ("supervisor",),
    ("upgrade",),
    ("blockd", "supervisor"),
    ("upgrade --tgtd",),
    ("blockd", "tgtd"),
    ("api",),
    ("api", "blockd", "supervisor", "tgtd"),
    ("supervisor", "tgtd"),
    ("blockd", "upgrade"),
    ("supervisor", "upgrade"),
)
_PROGRAMS = {"blockd": "stratocache.fs.blockd", "tgtd": "tgtd -f", "api": "stratocache.api.server"}


@contextlib.contextmanager
def busy_guest(directory: Path) -> Iterator[tuple[Appliance, Guest]]:
    """Run an appliance, and a guest that writes, syncs and reads an overlay and a raw disk; at the
    end the guest compares everything, see `writer.verdicts`."""
    published = publish_image(directory / "published", BASE_BYTES)
    with Appliance(
        directory / "appliance", endpoint=published.endpoint, fingerprint=published.fingerprint
    ) as appliance:
        clone = {"reference": published.identifier, "size_bytes": DISK_BYTES}
        disks = {
            "overlay": _attached(appliance, clone),
            "raw": _attached(appliance, {"size_bytes": DISK_BYTES}),
        }
        drives = [
            *file_disk(system_image(), boot=True, readonly=True),
            *file_disk(compile_writer(directory), readonly=True),
            *disks["overlay"],
            *disks["raw"],
        ]
        with Guest(drives, writer_script(list(disks))) as guest:
            guest.wait_for("begun", _BOOT_TIMEOUT_S)
            yield appliance, guest
            guest.send("stop")
            guest.finish(_FINAL_TIMEOUT_S)


def _attached(appliance: Appliance, request: dict[str, Any]) -> list[str]:
    """Create and attach a disk; return QEMU's arguments, which tell the guest of every error."""
    status, disk = appliance.request("POST", "/v1/disks", request)
    assert status == 201, disk
    path = f"/v1/disks/{disk['uuid']}/attachments"
    status, attachment = appliance.request("POST", path, {"instance": disk["uuid"]})
    assert status == 201, attachment
    arguments: list[str] = attachment["qemu_args"]
    return [word.replace("werror=stop,rerror=stop", "werror=report,rerror=report")
            for word in arguments]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Round:
    """One round: who was killed, and when, in seconds after the start of the guest."""

    label: str
    at_s: float


class Assassin:
    """Kills processes of an appliance while a guest works, and waits until both are well again.

    The supervisor is started again at once, as an init system does; nothing else is.
    """

    def __init__(
        self, appliance: Appliance, guest: Guest, chance: random.Random,
        victims: Sequence[tuple[str, ...]] = VICTIMS, again_chance: float = _AGAIN_CHANCE,
    ) -> None:  # fmt: skip
        self._appliance = appliance
        self._guest = guest
        self._chance = chance
        self._victims = victims
        self._again_chance = again_chance
        self.rounds: list[Round] = []

    def play(self, rounds: int) -> None:
        """Play rounds with the victims in turn; now and then a second blow meets the recovery."""
        for number in range(rounds):
            time.sleep(self._chance.uniform(*_REST_S))
            victims = self._victims[number % len(self._victims)]
            label = "+".join(victims)
            at_s = time.monotonic() - self._guest.started_s
            self._strike(victims)
            if number >= len(self._victims) and self._chance.random() < self._again_chance:
                time.sleep(self._chance.uniform(*_AGAIN_S))
                self._strike(self._chance.choice(self._victims))
                label = "twice"
            self.rounds.append(Round(label, at_s))
            self._wait_until_well(label)

    def _strike(self, victims: Sequence[str]) -> None:
        upgrades = [victim for victim in victims if victim.startswith("upgrade")]
        victims = [victim for victim in victims if victim not in upgrades]
        if not upgrades:
            self._kill(victims)
            return
        with subprocess.Popen(
            self._appliance.command(*upgrades[0].split()),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        ) as upgrade:  # fmt: skip
            if victims:
                time.sleep(self._chance.uniform(*_UPGRADE_S))
                self._kill(victims)
            output, _ = upgrade.communicate(timeout=2 * RECOVERY_TIMEOUT_S)
        assert upgrade.returncode == 0 or victims, output

    def _kill(self, victims: Sequence[str]) -> None:
        process = self._appliance.process
        assert process is not None
        order = self._chance.sample(victims, len(victims))
        pids = [
            (name, pid)
            for name in order
            for pid in ([process.pid] if name == "supervisor" else self._pids(name))
        ]
        for _, pid in pids:
            with contextlib.suppress(ProcessLookupError):  # it dies with its parent
                os.kill(pid, signal.SIGKILL)
            if self._chance.random() < 0.5:
                time.sleep(self._chance.uniform(0, _TOGETHER_S))
        if "supervisor" in victims:
            process.wait()
            self._serve_again()

    def _pids(self, name: str) -> list[int]:
        pids = self._appliance.pids(_PROGRAMS[name])
        serving = [pid for pid in pids if _command_name(pid) != "standby"]
        return serving or pids

    def _serve_again(self) -> None:
        with self._appliance.log.open("ab") as log:
            self._appliance.process = subprocess.Popen(
                self._appliance.command("serve"), stdout=log, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def _wait_until_well(self, label: str) -> None:
        """Return when the API is ready, the next blockd waits, and every thread of the guest gets on.

        What a blow in the middle of a recovery does is for the second blows to show.
        """
        deadline = time.monotonic() + RECOVERY_TIMEOUT_S
        while not (self._appliance.ready() and self._has_spare()):
            self._check(deadline, label)
        since_s = time.monotonic() - self._guest.started_s
        while not self._gets_on(since_s):
            self._check(deadline, label)

    def _has_spare(self) -> bool:
        status = read_status(self._appliance.run_dir / "supervisor.json")
        return status is not None and status.children["spare"].ready

    def _gets_on(self, since_s: float) -> bool:
        ticks = [counts for at_s, counts in progress(self._guest.console) if at_s > since_s]
        return len(ticks) > 1 and all(ticks[-1][name] > ticks[0][name] for name in ticks[0])

    def _check(self, deadline: float, label: str) -> None:
        assert self._appliance.process is not None
        status = self._appliance.process.poll()
        late = time.monotonic() > deadline
        if status is not None or late:
            what = f"serve ended with {status}" if status is not None else "no recovery"
            console = "\n".join(line.text for line in self._guest.console[-8:])
            log = self._appliance.log.read_text()[-4000:]
            raise AssertionError(f"{what} after {label}\n{console}\n{log}")
        time.sleep(0.05)

    def pauses(self) -> dict[tuple[str, str], list[float]]:
        """Return what the guest waited, by victims and disk: per round its longest operation."""
        slow = slow_operations(self._guest.console)
        threads = progress(self._guest.console)[0][1]
        disks = sorted({thread.partition(".")[0] for thread in threads})
        found: dict[tuple[str, str], list[float]] = defaultdict(list)
        ends = [round_.at_s for round_ in self.rounds[1:]] + [float("inf")]
        for round_, end_s in zip(self.rounds, ends, strict=True):
            for disk in disks:
                felt = [
                    operation.took_s
                    for operation in slow
                    if operation.disk == disk
                    and operation.ended_s > round_.at_s
                    and operation.begun_s < end_s
                ]
                found[round_.label, disk].append(max(felt, default=0.0))
        return found


def _command_name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def pause_table(pauses: dict[tuple[str, str], list[float]]) -> Iterator[str]:
    """Yield lines of a table: seconds that guests waited, 0.00 being less than 0.05."""
    yield f"{'killed':34} {'disk':8} {'rounds':>6} {'median':>7} {'p99':>7} {'max':>7}"
    for (label, disk), waits in sorted(pauses.items()):
        ordered = sorted(waits)
        p99 = percentile_99(waits)
        yield (
            f"{label:34} {disk:8} {len(waits):6} {statistics.median(waits):7.2f} "
            f"{p99:7.2f} {ordered[-1]:7.2f}"
        )


def percentile_99(waits: Sequence[float]) -> float:
    """Return the wait that one in a hundred exceeds; of fewer than a hundred the longest."""
    return sorted(waits)[min(len(waits) - 1, int(len(waits) * 0.99))]
