"""A whole physical host in a guest: appliance with either back end, Debian's kernel, open-iscsi.

Minutes of software emulation, so only `make crash` names this file; `tests/vm` has the parts.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import pytest
from support import initiator_guest as inside
from support import lio_guest
from support.iscsi import BusyGuest, Guest, Initiator
from support.kernel_guest import KernelGuest
from support.lio_guest import PORT
from support.publishing import Published, publish_image

MIB = 1024**2
BASE_BYTES = 4 * MIB
DISK_BYTES = 32 * MIB
GROWN_BYTES = 48 * MIB
ROUNDS = int(os.environ.get("HOST_ROUNDS", "1"))
"""How often everybody is killed in turn."""
DEATHS: dict[str, tuple[tuple[str, ...], ...]] = {
    "tgt": (("blockd",), ("tgtd",), ("supervisor",), ("blockd", "supervisor"), ()),
    "lio": (("blockd",), ("lio_server",), ("supervisor",), ("blockd", "supervisor"), ()),
}
"""Who is killed at once; nobody named means everything of ours."""
_ROUNDS_TIMEOUT_S = 900.0
pytestmark = [
    pytest.mark.vm,
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.timeout(3600 + 3600 * ROUNDS),
]

_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclass
class Host:
    """The guest as the physical host that it plays."""

    guest: KernelGuest
    backend: str
    published: Published

    def call(self, function: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
        """Call a function in the guest."""
        return self.guest.call(function, *arguments, **named)

    def command(self, line: str) -> Any:
        """Run a `stratocache` command, which must succeed."""
        status, document = self.call(inside.command, self.backend, line)
        assert status == 0, f"{line}: {document}\n{self.call(inside.log, self.backend)}"
        return document

    def failing_command(self, line: str) -> tuple[int, str]:
        """Run a `stratocache` command, which must fail; return its status and code."""
        status, document = self.call(inside.command, self.backend, line)
        assert status != 0, document
        return status, document["code"]

    def disk(self, form: str) -> str:
        """Create a disk and return its UUID."""
        base = f"--reference {self.published.identifier} " if form == "overlay" else ""
        uuid: str = self.command(f"disk create {base}--size {DISK_BYTES}")["uuid"]
        return uuid

    def initiator(self, attachment: Any) -> Initiator:
        """Return who may log in to an attachment from the machine that emulates this host."""
        chap = attachment["chap"]
        port = self.guest.port(PORT)
        return Initiator(port, attachment["target_iqn"], chap["username"], chap["secret"])


@pytest.fixture(scope="module")
def kernel_guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KernelGuest]:
    """A guest of this module's own."""
    with KernelGuest(tmp_path_factory.mktemp("kernel-guest"), PORT, memory_mib=1536) as guest:
        yield guest


@pytest.fixture(scope="module")
def physical_host(kernel_guest: KernelGuest, tmp_path_factory: pytest.TempPathFactory) -> Published:
    """The guest with udev and a name, and an image that it can fetch."""
    published = publish_image(tmp_path_factory.mktemp("published"), BASE_BYTES)
    kernel_guest.call(inside.prepare)
    return published


@pytest.fixture(scope="module", params=["tgt", "lio"])
def host(
    request: pytest.FixtureRequest, kernel_guest: KernelGuest, physical_host: Published
) -> Iterator[Host]:
    """An appliance in the guest with each back end."""
    backend: str = request.param
    published = physical_host
    kernel_guest.call(inside.start_appliance, backend, published.endpoint, published.fingerprint)
    yield Host(kernel_guest, backend, published)
    kernel_guest.call(inside.stop_appliance, backend)
    assert kernel_guest.call(lio_guest.backstores) == []


def test_without_iscsid_nothing_is_left(host: Host) -> None:
    """A login without the daemon is refused with its code, and leaves no attachment and no record."""
    if host.backend == "lio":  # it runs since the other back end's tests
        host.guest.run("iscsiadm", "-k", "0")
    uuid = host.disk("raw")

    failure = host.failing_command(f"disk attach {uuid} --instance here --open-iscsi")

    assert failure == (10, "iscsid-not-running")
    assert host.command(f"disk show {uuid}")["attached_to"] == []
    assert host.call(inside.records) == {}
    host.command(f"disk rm {uuid}")


@pytest.fixture(scope="module")
def iscsid(host: Host) -> Host:
    """The same host with open-iscsi's daemon."""
    host.call(inside.start_iscsid)
    return host


@pytest.mark.parametrize("form", ["raw", "overlay"])
def test_disk_comes_grows_and_goes(iscsid: Host, form: str) -> None:
    """The device has its by-path name, keeps what is written, sees the growth, and is gone after."""
    host = iscsid
    uuid = host.disk(form)
    attach = f"disk attach {uuid} --instance here --open-iscsi"
    shown = host.command(attach)
    device = shown["device"]
    expected = f"/dev/disk/by-path/ip-127.0.0.1:3260-iscsi-{shown['target_iqn']}-lun-1"
    assert device == expected
    assert shown["initiator"] == inside.INITIATOR
    assert "chap" not in shown
    assert host.call(inside.size_bytes, device) == DISK_BYTES
    again = host.command(attach)
    assert (again["device"], again["id"]) == (device, shown["id"])

    host.call(inside.write_blocks, device, 7, 2048)
    assert host.call(inside.read_block, device, 2047) == b"\x07" * 4096
    if form == "raw":
        before = host.call(inside.allocated_bytes, host.backend, uuid)
        host.guest.run("blkdiscard", "--offset", "0", "--length", str(4 * MIB), device)
        assert before - host.call(inside.allocated_bytes, host.backend, uuid) == 4 * MIB
        assert host.call(inside.read_block, device, 0) == bytes(4096)

    host.command(f"disk resize {uuid} {GROWN_BYTES}")
    host.call(inside.wait_for_size, device, GROWN_BYTES)
    assert host.call(inside.read_block, device, 2047) == b"\x07" * 4096
    assert host.call(inside.read_block, device, GROWN_BYTES // 4096 - 1) == bytes(4096)

    _check_secrets(host)
    host.guest.run("mkfs.ext4", "-q", device)
    host.guest.run("mount", device, "/mnt")
    detach = f"disk detach {uuid} --instance here --open-iscsi"
    assert host.failing_command(detach) == (4, "device-in-use")
    host.guest.run("umount", "/mnt")
    host.command(detach)
    assert not host.call(inside.logged_in)
    assert host.call(inside.records) == {}
    assert not host.call(inside.exists, device)
    host.command(detach)
    host.command(f"disk rm {uuid}")


def _check_secrets(host: Host) -> None:
    """The secret is in the record, which only root reads, and was on no command line."""
    ((mode, text),) = host.call(inside.records).values()
    lines = dict(line.split(" = ", 1) for line in text.splitlines() if " = " in line)
    secret = lines["node.session.auth.password"]
    assert len(secret) >= 12
    assert mode == 0o600
    assert lines["node.startup"] == "manual"
    assert lines["node.session.timeo.replacement_timeout"] == "-1"
    commands = host.guest.run("cat", str(inside.COMMANDS))
    assert "--login" in commands
    assert secret not in commands
    assert secret not in host.call(inside.log, host.backend)


@pytest.mark.parametrize("form", ["raw", "overlay"])
def test_deaths_are_pauses(iscsid: Host, form: str) -> None:
    """Whoever is killed, alone or together, this host's device and a disk of libiscsi see no error,
    and nothing is lost. The kernel cannot re-send FUSE requests: `blockd` takes tgtd with it."""
    host = iscsid
    uuid, other = host.disk(form), host.disk(form)
    device = host.command(f"disk attach {uuid} --instance here --open-iscsi")["device"]
    initiator = host.initiator(host.command(f"disk attach {other} --instance elsewhere"))
    host.call(inside.start_writing, device)
    with _logged_in(host, initiator) as guest, BusyGuest(guest) as busy:
        for victims in ROUNDS * DEATHS[host.backend]:
            _more_rounds(host, device)
            host.call(inside.pause, device)
            busy.reset()
            before = host.call(inside.starts_of_tgtd, host.backend)
            host.call(inside.kill, host.backend, *victims)
            _more_rounds(host, device)
            print(
                f"{host.backend} {form:8} {'+'.join(victims) or 'everything':18} kernel initiator "
                f"{host.call(inside.pause, device):5.1f} s, libiscsi {busy.pause():5.1f} s"
            )
            if victims == ("blockd",):
                assert host.call(inside.starts_of_tgtd, host.backend) > before
        print(f"libiscsi: {busy.rounds} rounds")
    written = host.call(inside.stop_writing, device)
    print(f"kernel initiator: {written.rounds} rounds, {written.lost} lost")
    assert written.lost == 0

    host.command(f"disk detach {uuid} --open-iscsi")
    host.command(f"disk detach {other}")
    for gone in (uuid, other):
        host.command(f"disk rm {gone}")


@contextmanager
def _logged_in(host: Host, initiator: Initiator) -> Iterator[Guest]:
    try:
        guest = Guest(initiator, _ROUNDS_TIMEOUT_S)
    except AssertionError as error:
        kernel = host.guest.run("sh", "-c", "dmesg | tail -n 40")
        raise AssertionError(f"{error}\n{kernel}\n{host.call(inside.log, host.backend)}") from None
    with guest:
        yield guest


def _more_rounds(host: Host, device: str) -> None:
    before = host.call(inside.rounds_written, device)
    deadline = time.monotonic() + _ROUNDS_TIMEOUT_S
    while host.call(inside.rounds_written, device) < before + 3:
        assert time.monotonic() < deadline, host.call(inside.initiator_state)
        time.sleep(0.1)
