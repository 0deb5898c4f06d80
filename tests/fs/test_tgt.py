"""Targets of a real tgtd, as initiators meet them."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import pytest
import trio
from support.iscsi import INITIATOR, Guest, Initiator, free_port, running_tgtd, server_pid

from stratocache.cache.errors import Conflict, Internal, InvalidInput, Unreachable
from stratocache.fs.portal import Portal
from stratocache.fs.target import (
    Target,
    check_initiator_name,
    iqn_of,
    serial_of,
)
from stratocache.fs.tgt import Tgt

pytestmark = pytest.mark.root

MIB = 1024**2
UUIDS = (
    "3f2504e0-4f89-41d3-9a0c-0305e82c3301",
    "7c9e6679-7425-40de-944b-e07fc1f90ae7",
    "16fd2706-8baf-433b-82eb-8c7fada847da",
)
_T = TypeVar("_T")


@dataclass
class Bench:
    """A tgtd with its control and a folder for disks."""

    folder: Path
    port: int
    control: Path
    tgt: Tgt

    def run(self, action: Callable[[], Awaitable[_T]]) -> _T:
        """Await one call."""

        async def call() -> _T:
            return await action()

        return trio.run(call)

    def target(self, number: int = 1) -> Target:
        """Return a target on a disk file of its own."""
        disk = self.folder / f"disk{number}"
        with disk.open("ab") as file:
            file.truncate(8 * MIB)
        return Target(
            number=number,
            iqn=iqn_of(UUIDS[number % len(UUIDS)] + str(number)),
            backing=disk,
            read_only=False,
            serial=serial_of(UUIDS[number % len(UUIDS)]),
            chap_username=f"user{number}",
            chap_secret=f"secret-number-{number}",
        )

    def create(self, target: Target) -> Initiator:
        """Make a target and return an initiator that may log in."""
        self.run(lambda: self.tgt.create(target))
        return Initiator(self.port, target.iqn, target.chap_username, target.chap_secret)

    def admin(self, *arguments: str) -> None:
        """Do something behind our back, as tgt's own tool."""
        subprocess.run(
            ["tgtadm", "--lld", "iscsi", *arguments],
            env={**os.environ, "TGT_IPC_SOCKET": str(self.control.with_suffix(""))},
            check=True,
        )


def _portal(port: int) -> Portal:
    return Portal("127.0.0.1", port)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """A running tgtd without targets."""
    port = free_port()
    with running_tgtd(tmp_path, port) as control:
        yield Bench(tmp_path, port, control, Tgt(control, _portal(port)))


@pytest.fixture
def closed_bench(tmp_path: Path) -> Iterator[Bench]:
    """A tgtd as the supervisor starts it, which nobody can reach yet."""
    port = free_port()
    with running_tgtd(tmp_path, port, closed=True) as control:
        yield Bench(tmp_path, port, control, Tgt(control, _portal(port)))


def _listening(pid: int) -> set[str]:
    """Return the addresses that a process listens on."""
    shown = subprocess.run(["ss", "-Hltnp"], check=True, capture_output=True, text=True).stdout
    return {line.split()[3] for line in shown.splitlines() if f"pid={pid}," in line}


def test_portal_is_opened_alone(closed_bench: Bench) -> None:
    """A tgtd listens for nobody until its portal is opened, then there only, and twice is once."""
    bench = closed_bench
    initiator = bench.create(bench.target())
    pid = server_pid(bench.control)
    before = _listening(pid)
    assert before and not any(where.endswith(f":{bench.port}") for where in before)
    assert all(where.startswith("127.0.0.2:") for where in before)
    assert initiator.io("read 0 512").returncode != 0

    bench.run(bench.tgt.open_portal)
    bench.run(bench.tgt.open_portal)

    assert _listening(pid) == {f"127.0.0.1:{bench.port}"}
    assert initiator.io("read 0 512").returncode == 0
    assert initiator.discover().returncode != 0
    bench.admin("--mode", "portal", "--op", "delete", "--param", f"portal=127.0.0.1:{bench.port}")
    assert initiator.io("read 0 512").returncode != 0
    bench.run(bench.tgt.open_portal)
    assert initiator.io("read 0 512").returncode == 0


def test_named_and_sixth_version_portals(closed_bench: Bench) -> None:
    """A portal may be a name or an IPv6 address; opening it again changes nothing."""
    bench = closed_bench
    for address in ("localhost", "::1"):
        tgt = Tgt(bench.control, Portal(address, bench.port))
        bench.run(tgt.open_portal)
        opened = _listening(server_pid(bench.control))
        bench.run(tgt.open_portal)
        assert _listening(server_pid(bench.control)) == opened
        assert opened <= {f"127.0.0.1:{bench.port}", f"[::1]:{bench.port}"}
        assert opened


def test_taken_portal_is_a_conflict(closed_bench: Bench) -> None:
    """A port that another program has taken is told as such, and opened when it is free again."""
    bench = closed_bench
    with socket.socket() as other:
        other.bind(("127.0.0.1", bench.port))
        other.listen()
        with pytest.raises(Conflict) as caught:
            bench.run(bench.tgt.open_portal)
    assert caught.value.code == "portal-in-use"

    bench.run(bench.tgt.open_portal)

    assert _listening(server_pid(bench.control)) == {f"127.0.0.1:{bench.port}"}


def test_chap_lets_in_who_knows_the_secret(bench: Bench) -> None:
    """The right secret reads what it wrote; a wrong one, another target's and none are refused."""
    initiator = bench.create(bench.target(1))
    other = bench.create(bench.target(2))

    assert initiator.io("write -P 7 0 64k", "read -P 7 0 64k").returncode == 0
    assert initiator.with_secret("secret-number-x").io("read 0 512").returncode != 0
    assert replace(initiator, username="", secret="").io("read 0 512").returncode != 0
    stranger = replace(initiator, username=other.username, secret=other.secret)
    assert stranger.io("read 0 512").returncode != 0
    assert (bench.folder / "disk1").read_bytes()[: 64 * 1024] == b"\x07" * 64 * 1024


def test_read_only_target_refuses_writes(bench: Bench) -> None:
    """Reads succeed, a write fails even for a client that opened it for writing, bytes stay."""
    target = replace(bench.target(), read_only=True)
    target.backing.write_bytes(b"\x05" * 8 * MIB)
    initiator = bench.create(target)

    assert initiator.io("read -P 5 0 1M", read_only=True).returncode == 0
    write = initiator.io("write -P 9 0 4k")
    assert write.returncode != 0 or "failed" in write.stdout + write.stderr
    assert target.backing.read_bytes() == b"\x05" * 8 * MIB


def test_discard_frees_space(bench: Bench) -> None:
    """What a guest discards on a thin-provisioned disk takes no space any more and reads zeros."""
    target = replace(bench.target(), thin_provisioned=True)
    initiator = bench.create(target)
    assert initiator.io("write -P 9 0 8M", "flush").returncode == 0
    before = target.backing.stat().st_blocks * 512
    done = initiator.io("discard 1M 4M", "flush", "read -P 0 1M 4M", "read -P 9 5M 3M")

    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stdout + done.stderr
    assert before - target.backing.stat().st_blocks * 512 == 4 * MIB


def test_initiator_binding_refuses_other_names(bench: Bench) -> None:
    """A bound target is found by its initiator only, even when another knows the secret."""
    target = replace(bench.target(), initiator=INITIATOR)
    initiator = bench.create(target)

    assert initiator.io("read 0 512").returncode == 0
    assert replace(initiator, name=INITIATOR + "2").io("read 0 512").returncode != 0
    assert bench.run(bench.tgt.list)[1].matches(target)
    bench.run(lambda: bench.tgt.remove(1))
    assert initiator.io("read 0 512").returncode != 0


def test_nobody_can_list_targets(bench: Bench) -> None:
    """Discovery is refused without a password and with that of one attachment."""
    initiator = bench.create(bench.target())

    for asking in (initiator, replace(initiator, username="", secret="")):
        listing = asking.discover()
        assert listing.returncode != 0
        assert "iqn" not in listing.stdout


def test_serial_follows_the_disk(bench: Bench) -> None:
    """A disk has one serial number and designator under any target number; another disk differs."""
    first, second = bench.target(1), replace(bench.target(2), serial=serial_of(UUIDS[1]))
    assert first.serial == second.serial
    seen = [
        [bench.create(target).inquiry("-e", "1", "-c", page).stdout for page in ("128", "131")]
        for target in (first, second, bench.target(3))
    ]

    assert seen[0] == seen[1]
    assert first.serial in seen[0][0] and first.serial in seen[0][1]
    assert seen[0][0] != seen[2][0] and seen[0][1] != seen[2][1]


def test_removing_one_target_leaves_the_others_session(bench: Bench) -> None:
    """A session goes on without a pause or a new login while the target beside it goes away."""
    kept, gone = bench.create(bench.target(1)), bench.create(bench.target(2))
    with Guest(kept) as guest, Guest(gone) as leaving:
        guest.round()
        leaving.round()
        before = bench.run(lambda: bench.tgt.sessions(1))

        bench.run(lambda: bench.tgt.remove(2))
        _, longest = guest.rounds(0.5)

        assert longest < 0.5
        assert bench.run(lambda: bench.tgt.sessions(1)) == before
        assert [session.initiator for session in before] == [INITIATOR]
        assert list(bench.run(bench.tgt.list)) == [1]


@pytest.mark.parametrize("round_", range(5))
def test_removal_under_load(bench: Bench, round_: int) -> None:
    """A target full of requests in flight goes away within its time, and tgtd stays up."""
    initiator = bench.create(bench.target())
    with subprocess.Popen(
        ["qemu-img", "bench", "-t", "none", "-w", "-d", "64", "-c", "1000000", "-s", "65536",
         "--image-opts", initiator.image_options],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as load:  # fmt: skip
        try:
            while not bench.run(lambda: bench.tgt.sessions(1)):
                assert load.poll() is None
            started = time.monotonic()
            bench.run(lambda: bench.tgt.remove(1))
            duration_s = time.monotonic() - started
            assert load.poll() is None
        finally:
            load.kill()

    print(f"removed under load in {duration_s * 1000:.1f} ms")
    assert duration_s < 2
    assert bench.run(bench.tgt.list) == {}
    with pytest.raises(subprocess.CalledProcessError):
        bench.admin("--op", "delete", "--mode", "account", "--user", "user1")


def test_recreated_target_is_the_same_to_its_guest(bench: Bench) -> None:
    """A guest whose target is removed and made again on another file goes on without an error."""
    target = bench.target()
    initiator = bench.create(target)
    with Guest(initiator) as guest:
        guest.rounds(0.2)
        bench.run(lambda: bench.tgt.remove(1))
        copy = replace(target, backing=bench.folder / "copy")
        target.backing.rename(copy.backing)
        bench.create(copy)
        count, longest = guest.rounds(0.5)

    assert count > 0
    print(f"pause {longest:.2f} s")
    assert bench.run(bench.tgt.list)[1].backing == str(copy.backing)


def test_creating_what_is_there_disturbs_nobody(bench: Bench) -> None:
    """Making a target again leaves its session alone; with another secret wanted it is remade."""
    target = bench.target()
    with Guest(bench.create(target)) as guest:
        guest.round()
        before = bench.run(lambda: bench.tgt.sessions(1))
        bench.create(target)
        guest.round()
        assert bench.run(lambda: bench.tgt.sessions(1)) == before

    renamed = replace(target, chap_username="another", chap_secret="another-secret")
    assert bench.create(renamed).io("read 0 512").returncode == 0
    assert bench.run(bench.tgt.list)[1].accounts == ("another",)


def test_half_made_target_is_seen_and_remade(bench: Bench) -> None:
    """Each stage that a death between two steps leaves is not a match, and becomes one."""
    target = bench.target()
    tid = ("--tid", "1")
    stages = (
        ("--op", "new", "--mode", "target", *tid, "-T", target.iqn),
        ("--op", "new", "--mode", "account", "--user", "user1", "--password", "other-secret-1"),
        ("--op", "bind", "--mode", "account", *tid, "--user", "user1"),
        ("--op", "new", "--mode", "logicalunit", *tid, "--lun", "1", "-b", str(target.backing)),
    )
    for count in range(1, len(stages) + 1):
        for stage in stages[:count]:
            bench.admin(*stage)
        half = bench.run(bench.tgt.list)[1]
        assert not half.matches(target)

        assert bench.create(target).io("read 0 512").returncode == 0

        assert bench.run(bench.tgt.list)[1].matches(target)
        bench.run(lambda: bench.tgt.remove(1))


def test_foreign_differences_are_seen(bench: Bench) -> None:
    """Another access list, another logical unit beside ours or a changed flag is not a match."""
    target = bench.target()
    changes = (
        ("--op", "bind", "--mode", "target", "--tid", "1", "-Q", "iqn.2026-11.org.example:more"),
        ("--op", "unbind", "--mode", "target", "--tid", "1", "-I", "ALL"),
        ("--op", "new", "--mode", "logicalunit", "--tid", "1", "--lun", "2", "-b",
         str(target.backing)),
        ("--op", "update", "--mode", "logicalunit", "--tid", "1", "--lun", "1", "--params",
         "readonly=1"),
        ("--op", "update", "--mode", "logicalunit", "--tid", "1", "--lun", "1", "--params",
         "online=0"),
    )  # fmt: skip
    for change in changes:
        bench.create(target)
        assert bench.run(bench.tgt.list)[1].matches(target)
        bench.admin(*change)
        assert not bench.run(bench.tgt.list)[1].matches(target)


def test_missing_file_leaves_no_target(bench: Bench) -> None:
    """A target on a file that is not there is an error with its code, and leaves nothing."""
    target = replace(bench.target(), backing=bench.folder / "missing")

    with pytest.raises(Internal) as caught:
        bench.create(target)

    assert caught.value.code == "target-daemon-error"
    assert "secret" not in caught.value.message
    assert bench.run(bench.tgt.list) == {}
    bench.run(lambda: bench.tgt.remove(1))


def test_values_that_would_be_parameters_are_refused(bench: Bench) -> None:
    """A comma or a line end, which tgtd would read as something else, is refused before."""
    good = bench.target()
    for field, bad in (
        ("backing", replace(good, backing=Path("/tmp/a,bstype=null"))),
        ("chap_secret", replace(good, chap_secret="a,b")),
        ("initiator", replace(good, initiator="iqn.2026-11.org.example:x,y")),
        ("iqn", replace(good, iqn="iqn.2026-11.org.stratocache:a\nb")),
    ):
        with pytest.raises(InvalidInput) as caught:
            bench.create(bad)
        assert (caught.value.code, caught.value.field) == ("target-value-unfit", field)

    assert bench.run(bench.tgt.list) == {}


def test_absent_daemon_is_unreachable(tmp_path: Path) -> None:
    """No socket is `Unreachable` at once."""
    with pytest.raises(Unreachable) as caught:
        trio.run(Tgt(tmp_path / "tgtd.0", _portal(free_port())).list)

    assert caught.value.code == "target-daemon-unreachable"


def test_silent_daemon_is_unreachable_in_bounded_time(bench: Bench) -> None:
    """A stopped tgtd does not hold its caller longer than the time given."""
    hasty = Tgt(bench.control, _portal(bench.port), answer_timeout_s=0.3)
    pid = server_pid(bench.control)
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(Unreachable):
            trio.run(hasty.ping)
    finally:
        os.kill(pid, signal.SIGCONT)
    trio.run(bench.tgt.ping)


def test_busy_target_is_a_conflict(bench: Bench) -> None:
    """When time is up before initiators are out, removal says so, and nobody can log in any more."""
    initiator = bench.create(bench.target())
    with Guest(initiator) as guest:
        guest.round()
        with pytest.raises(Conflict) as caught:
            trio.run(Tgt(bench.control, _portal(bench.port), busy_timeout_s=0).remove, 1)
        assert caught.value.code == "target-busy"
        assert bench.run(bench.tgt.list)[1].acl == ()
        assert initiator.io("read 0 512").returncode != 0

    bench.run(lambda: bench.tgt.remove(1))
    assert bench.run(bench.tgt.list) == {}


def test_many_targets(bench: Bench) -> None:
    """Fifty targets are made, listed and removed, in time that fits a launch."""
    targets = [bench.target(number) for number in range(1, 51)]
    durations = []

    async def make() -> None:
        for target in targets:
            started = time.monotonic()
            await bench.tgt.create(target)
            durations.append(time.monotonic() - started)

    trio.run(make)
    found = bench.run(bench.tgt.list)
    assert [found[target.number].matches(target) for target in targets] == [True] * 50

    async def drop() -> None:
        for target in targets:
            await bench.tgt.remove(target.number)

    trio.run(drop)
    print(f"50 targets: {sum(durations) * 1000:.0f} ms, slowest {max(durations) * 1000:.1f} ms")
    assert max(durations) < 0.5
    assert bench.run(bench.tgt.list) == {}


def test_initiator_names() -> None:
    """Names of RFC 7143 pass, others are refused with their code."""
    for name in (
        "iqn.1993-08.org.debian:01:9b27d3fa8dd2",
        "iqn.2026-11.org.example",
        "eui.02004567A425678D",
        "naa.62004567BA64678D0123456789ABCDEF",
    ):
        assert check_initiator_name(name) == name
    for name in ("", "ALL", "iqn.x", "iqn.2026-11.org.example:a,b", "10.0.0.1",
                 "iqn.2026-11.org.example:" + "a" * 200, "iqn.2026-11.org.example:a\n"):  # fmt: skip
        with pytest.raises(InvalidInput) as caught:
            check_initiator_name(name)
        assert caught.value.code == "initiator-invalid"


def test_serials_are_hexadecimal_and_distinct() -> None:
    """Disks and images get 32 hexadecimal digits that depend on nothing but their names."""
    serials = [serial_of(subject) for subject in (*UUIDS, "BN1EEkPiBx87_uLj2-sdybSI-Xb")]

    assert serials[0] == UUIDS[0].replace("-", "")
    assert len(set(serials)) == 4
    assert all(len(serial) == 32 and int(serial, 16) for serial in serials)
