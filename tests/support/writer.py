"""The verifier of `tests/vm/writer` in a guest: compiled, started, listened to, judged."""

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from stratodemo.guest import ConsoleLine, GuestError

_SOURCE = Path(__file__).resolve().parents[1] / "vm" / "writer" / "writer.c"
_DISK_BYTES = 4096
_TICK = re.compile(r"STRATO tick=(?P<counts>( ?\w+\.[0-9]+:[0-9]+)+)\s*$")
_SLOW = re.compile(r"STRATO slow=(?P<disk>\S+) (?P<operation>\S+) (?P<took_ms>\d+)")
_RESULT = re.compile(r"STRATO result-(?P<disk>\S+?)=(?P<counts>.*)")
_FAULT = re.compile(r"STRATO (fault|failed)=.*|.*(I/O error|Buffer I/O).*")


def compile_writer(folder: Path) -> Path:
    """Compile the program for any x86-64 guest; give a file that can be a guest's disk."""
    program = folder / "writer"
    subprocess.run(
        ["gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread",
         "-o", str(program), str(_SOURCE)],
        check=True,
    )  # fmt: skip
    with program.open("r+b") as file:
        file.truncate(-(-program.stat().st_size // _DISK_BYTES) * _DISK_BYTES)
    return program


def writer_script(names: Sequence[str]) -> str:
    """Return what the guest runs: its first disk is the program, the next ones have these names."""
    disks = " ".join(f'{name}="$(disk {number})"' for number, name in enumerate(names, 2))
    return f'cat "$(disk 1)" > /run/writer && chmod +x /run/writer && /run/writer {disks}\n'


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the writer found out about one disk: counts of operations and of blocks."""

    acknowledged: int
    synced: int
    read: int
    errors: int
    lost: int
    wrong: int
    slow: int
    slowest_ms: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SlowOperation:
    """An operation that took 50 ms or more; times in seconds after the start of the guest."""

    disk: str
    begun_s: float
    ended_s: float

    @property
    def took_s(self) -> float:
        """How long it took."""
        return self.ended_s - self.begun_s


def progress(console: Sequence[ConsoleLine]) -> list[tuple[float, Mapping[str, int]]]:
    """Return every tick: when it came and how many rounds each thread (`disk.number`) had done.

    One that a message of the guest's kernel has broken is left out.
    """
    found: list[tuple[float, Mapping[str, int]]] = []
    for line in console:
        if match := _TICK.search(line.text):
            pairs = (pair.split(":") for pair in match["counts"].split())
            found.append((line.at_s, {name: int(count) for name, count in pairs}))
    return found


def slow_operations(console: Sequence[ConsoleLine]) -> list[SlowOperation]:
    """Return the operations that took 50 ms or more, in the order of their ends."""
    return [
        SlowOperation(match["disk"], line.at_s - int(match["took_ms"]) / 1000, line.at_s)
        for line in console
        if (match := _SLOW.search(line.text))
    ]


def faults(console: Sequence[ConsoleLine]) -> list[str]:
    """Return every line of the writer or of the guest's kernel that speaks of a fault."""
    return [line.text for line in console if _FAULT.search(line.text)]


def verdicts(console: Sequence[ConsoleLine]) -> dict[str, Verdict]:
    """Return the writer's results by disk. Raises `GuestError` when there are none."""
    found = {}
    for line in console:
        if match := _RESULT.search(line.text):
            counts = dict(pair.split(":") for pair in match["counts"].split())
            slowest = tuple(int(value) for value in counts.pop("slowest_ms").split(","))
            numbers = {name: int(value) for name, value in counts.items()}
            assert set(numbers) == {field.name for field in fields(Verdict)} - {"slowest_ms"}
            found[match["disk"]] = Verdict(**numbers, slowest_ms=slowest)
    if not found:
        raise GuestError("the writer reported no result")
    return found
