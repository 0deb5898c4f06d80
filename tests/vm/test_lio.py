"""Targets of the real LIO, in a guest with Debian's kernel; initiators run on this machine."""

import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from support import lio_guest
from support.iscsi import INITIATOR, Guest
from support.kernel_guest import DATA, KernelGuest
from support.lio_guest import MIB, LioBench

from stratocache.cache.errors import Internal, InvalidInput
from stratocache.fs import lio_switch

pytestmark = [pytest.mark.vm, pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def server(kernel_guest: KernelGuest) -> Iterator[list[int]]:
    """The process that makes targets in the guest: its id, which a test may exchange."""
    running = [kernel_guest.call(lio_guest.start_server)]
    yield running
    kernel_guest.call(lio_guest.kill_server, running[0])


@pytest.fixture
def bench(kernel_guest: KernelGuest, server: list[int]) -> Iterator[LioBench]:
    """LIO without targets of ours."""
    yield LioBench(kernel_guest)
    kernel_guest.call(lio_switch.remove_all)
    assert kernel_guest.call(lio_guest.list_targets) == {}


def test_chap_lets_in_who_knows_the_secret(bench: LioBench) -> None:
    """The right secret reads what it wrote; a wrong one, another target's and none are refused."""
    initiator = bench.create(bench.target(1))
    other = bench.create(bench.target(2))

    assert initiator.io("write -P 7 0 64k", "flush", "read -P 7 0 64k").returncode == 0
    assert initiator.with_secret("secret-number-x").io("read 0 512").returncode != 0
    assert replace(initiator, username="", secret="").io("read 0 512").returncode != 0
    stranger = replace(initiator, username=other.username, secret=other.secret)
    assert stranger.io("read 0 512").returncode != 0
    written = bench.call(lio_guest.content, DATA / "lio1", 0, 64 * 1024)
    assert written == b"\x07" * 64 * 1024


def test_read_only_target_refuses_writes(bench: LioBench) -> None:
    """Reads succeed, a write fails even for a client that opened it for writing, bytes stay."""
    for initiator_name in (None, INITIATOR):
        target = replace(bench.target(fill=5), read_only=True, initiator=initiator_name)
        initiator = bench.create(target)

        assert initiator.io("read -P 5 0 1M", read_only=True).returncode == 0
        write = initiator.io("write -P 9 0 4k")
        assert write.returncode != 0 or "failed" in write.stdout + write.stderr
        assert bench.call(lio_guest.content, target.backing, 0, 4096) == b"\x05" * 4096
        assert bench.call(lio_guest.list_targets)[1].matches(target)


def test_discard_frees_space(bench: LioBench) -> None:
    """What a guest discards on a thin-provisioned disk takes no space any more and reads zeros."""
    target = replace(bench.target(fill=9), thin_provisioned=True)
    initiator = bench.create(target)
    before = bench.call(lio_guest.allocated_bytes, target.backing)
    done = initiator.io("discard 1M 4M", "flush", "read -P 0 1M 4M", "read -P 9 5M 3M")

    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stdout + done.stderr
    assert before - bench.call(lio_guest.allocated_bytes, target.backing) == 4 * MIB


def test_write_cache_is_announced(bench: LioBench) -> None:
    """The file is written through the kernel's cache, and guests are told, so that they flush."""
    target = bench.target()
    bench.create(target)

    (file,) = bench.call(lio_guest.backstores)
    assert bench.call(lio_guest.read_text, file / "attrib/emulate_write_cache") == "1"
    assert "Buffered-WCE" in bench.call(lio_guest.read_text, file / "info")


def test_initiator_binding_refuses_other_names(bench: LioBench) -> None:
    """A bound target is found by its initiator only, even when another knows the secret."""
    target = replace(bench.target(), initiator=INITIATOR)
    initiator = bench.create(target)

    assert replace(initiator, name=INITIATOR + "2").io("read 0 512").returncode != 0
    assert initiator.with_secret("another-secret").io("read 0 512").returncode != 0
    with Guest(initiator) as guest:
        guest.round()
        (session,) = bench.call(lio_guest.sessions, 1)
        assert (session.initiator, session.address) == (INITIATOR, "10.0.2.2")
    assert bench.call(lio_guest.list_targets)[1].matches(target)
    bench.call(lio_guest.remove, 1)
    assert initiator.io("read 0 512").returncode != 0


def test_serial_follows_the_disk(bench: LioBench) -> None:
    """A disk has one serial number and designator under any target number; another disk differs."""
    first, third = bench.target(1), bench.target(3)
    second = replace(bench.target(2), serial=first.serial)
    seen = []
    for target in (first, second, third):
        initiator = bench.create(target)
        serial = initiator.inquiry("-e", "1", "-c", "128").stdout
        page = initiator.inquiry("-e", "1", "-c", "131").stdout
        # the other designators are those of the port and the target
        unit = [part for part in page.split("DEVICE DESIGNATOR") if "LOGICAL_UNIT" in part]
        seen.append((serial, [part.partition("\n")[2] for part in unit]))

    assert first.serial in seen[0][0] and len(seen[0][1]) > 0
    assert seen[0] == seen[1]
    assert seen[0][0] != seen[2][0] and seen[0][1] != seen[2][1]


def test_removing_one_target_leaves_the_others_session(bench: LioBench) -> None:
    """A session goes on without a new login while the target beside it goes away."""
    kept, gone = bench.create(bench.target(1)), bench.create(bench.target(2))
    with Guest(kept) as guest, Guest(gone) as leaving:
        guest.round()
        leaving.round()

        bench.call(lio_guest.remove, 2)
        _, longest = guest.rounds(0.5)

        assert longest < 0.9  # a new login comes after a second at the earliest
        assert [item.initiator for item in bench.call(lio_guest.sessions, 1)] == [INITIATOR]
        assert list(bench.call(lio_guest.list_targets)) == [1]


def test_removal_under_load(bench: LioBench) -> None:
    """A target full of requests in flight goes away, and its file is free."""
    initiator = bench.create(bench.target())
    with subprocess.Popen(
        ["qemu-img", "bench", "-t", "none", "-w", "-d", "64", "-c", "1000000", "-s", "65536",
         "--image-opts", initiator.image_options],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as load:  # fmt: skip
        try:
            while not bench.call(lio_guest.sessions, 1):
                assert load.poll() is None
            bench.call(lio_guest.remove, 1)
            assert load.poll() is None
        finally:
            load.kill()

    assert bench.call(lio_guest.list_targets) == {}
    assert bench.call(lio_guest.backstores) == []


def test_recreated_target_is_the_same_to_its_guest(bench: LioBench) -> None:
    """A guest whose target is made again on another, larger file goes on without an error."""
    target = bench.target()
    with Guest(bench.create(target)) as guest:
        guest.rounds(0.2)
        copy = replace(target, backing=DATA / "copy")
        bench.guest.run("cp", str(target.backing), str(copy.backing))
        bench.guest.run("truncate", "-s", "16M", str(copy.backing))
        bench.create(copy)
        guest.round()

    assert bench.call(lio_guest.list_targets)[1].backing == str(copy.backing)
    grown = bench.create(copy).io("write -P 3 12M 64k", "read -P 3 12M 64k")
    assert grown.returncode == 0, grown.stdout + grown.stderr


def test_creating_what_is_there_disturbs_nobody(bench: LioBench) -> None:
    """Making a target again leaves its session alone; with another secret it is remade."""
    target = bench.target()
    with Guest(bench.create(target)) as guest:
        guest.round()
        bench.create(target)
        _, longest = guest.rounds(0.3)
        assert longest < 0.9
        assert len(bench.call(lio_guest.sessions, 1)) == 1

    renewed = bench.create(replace(target, chap_secret="another-secret"))
    assert renewed.io("read 0 512").returncode == 0
    assert renewed.with_secret(target.chap_secret).io("read 0 512").returncode != 0


def test_death_of_the_process_disturbs_nobody(bench: LioBench, server: list[int]) -> None:
    """Sessions go on while the process that made their target is dead; the next one knows it."""
    target = bench.target()
    with Guest(bench.create(target)) as guest:
        guest.round()
        bench.call(lio_guest.kill_server, server[0])
        _, longest = guest.rounds(0.5)
        assert longest < 0.9
        server[0] = bench.call(lio_guest.start_server)

        assert bench.call(lio_guest.list_targets)[1].matches(target)
        guest.round()


def test_difference_is_seen_and_repaired(bench: LioBench) -> None:
    """Whatever somebody changes or a death leaves undone is not a match, and becomes one."""
    target = bench.target()
    group = lio_switch.ISCSI / target.iqn / lio_switch.GROUP
    changes = {
        "enable": "0",
        "attrib/authentication": "0",
        "attrib/generate_node_acls": "0",
        "attrib/demo_mode_write_protect": "1",
        "auth/userid": "somebody",
    }
    for name, value in changes.items():
        initiator = bench.create(target)
        bench.call(lio_guest.write_text, group / name, value)
        assert not bench.call(lio_guest.list_targets)[1].matches(target), name
    bench.create(target)
    bench.call(lio_switch.remove_group, group)
    assert not bench.call(lio_guest.list_targets)[1].matches(target)

    assert bench.create(target).io("read 0 512").returncode == 0
    assert initiator.io("read 0 512").returncode == 0


def test_targets_of_others_stay(bench: LioBench) -> None:
    """What another program has in LIO is not listed, and outlives the removal of all of ours."""
    bench.call(lio_guest.make_foreign_target)
    try:
        bench.create(bench.target())
        assert list(bench.call(lio_guest.list_targets)) == [1]
        bench.call(lio_switch.remove_all)
        assert bench.call(lio_guest.list_targets) == {}
        assert bench.call(lio_guest.foreign_target_lives)
    finally:
        bench.call(lio_guest.remove_foreign_target)


def test_suspended_targets_are_those_below_a_folder(bench: LioBench) -> None:
    """Suspending a folder's targets closes their sessions and refuses logins, of no others."""
    below = replace(bench.target(1), backing=DATA / "folder" / "disk")
    bench.guest.run("mkdir", "-p", str(below.backing.parent))
    bench.call(lio_guest.make_file, below.backing, 8 * MIB)
    inside, outside = bench.create(below), bench.create(bench.target(2))
    with Guest(outside) as guest:
        guest.round()
        started = time.monotonic()
        bench.call(lio_guest.suspend, below.backing.parent)
        assert time.monotonic() - started < 20
        _, longest = guest.rounds(0.3)
        assert longest < 0.9

    assert inside.io("read 0 512").returncode != 0
    assert outside.io("read 0 512").returncode == 0
    assert not bench.call(lio_guest.list_targets)[1].matches(below)


def test_missing_file_leaves_no_target(bench: LioBench) -> None:
    """A target on a file that is not there is an error with its code, and leaves nothing."""
    target = replace(bench.target(), backing=DATA / "missing")

    with pytest.raises(Internal) as caught:
        bench.create(target)

    assert caught.value.code == "target-daemon-error"
    assert "secret" not in caught.value.message
    assert bench.call(lio_guest.list_targets) == {}
    bench.call(lio_guest.remove, 1)


def test_values_that_configfs_would_change_are_refused(bench: LioBench) -> None:
    """A comma, a line end or outer spaces are refused before anything is made."""
    good = bench.target()
    for field, bad in (
        ("backing", replace(good, backing=DATA / "a,fd_dev_size=1")),
        ("chap_secret", replace(good, chap_secret="secret\n")),
        ("chap_username", replace(good, chap_username="NULL")),
        ("serial", replace(good, serial=" 1")),
    ):
        with pytest.raises(InvalidInput) as caught:
            bench.create(bad)
        assert (caught.value.code, caught.value.field) == ("target-value-unfit", field)

    assert bench.call(lio_guest.list_targets) == {}
