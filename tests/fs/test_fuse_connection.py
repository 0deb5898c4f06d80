"""A FUSE connection that outlives who serves it."""

import os
import signal
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.fuse_child import DISK_BYTES

from stratocache.cache.configuration import Configuration
from stratocache.fs.fuse_mount import FuseMount, _mounts_at, mounted_at, unmount_stale
from stratocache.fs.run_directory import RunDirectory

pytestmark = pytest.mark.root

# the process that holds the connection must not have files of the mount open: others do the I/O
READER = """
import os, sys
descriptor = os.open(sys.argv[1], os.O_RDWR)
print("open", flush=True)
for line in sys.stdin:
    number = int(line)
    os.pwrite(descriptor, bytes([number]) * 4096, number * 4096)
    print(os.pread(descriptor, 4096, number * 4096) == bytes([number]) * 4096, flush=True)
"""

# whole mebibytes, so that a request has many pages; says how many there were and how they failed
WRITER = """
import os, sys
descriptor = os.open(sys.argv[1], os.O_RDWR)
offset, count, errors = int(sys.argv[2]) << 20, 0, []
while not os.path.exists(sys.argv[3]):
    count += 1
    content = bytes([count % 255 + 1]) * 2**20
    try:
        os.pwrite(descriptor, content, offset)
        if os.pread(descriptor, 2**20, offset) != content:
            errors.append("wrong")
    except OSError as error:
        errors.append(error.strerror)
print(count, errors)
"""
DEATHS = 120
WRITERS = 16


@dataclass
class Connection:
    """A mount held by the test, and where its servers find things."""

    mount: FuseMount
    directory: RunDirectory
    config_json: Path

    def serve(self) -> subprocess.Popen[bytes]:
        """Start a server; return when it serves."""
        reader, writer = os.pipe()
        descriptor = self.mount.descriptor
        process = subprocess.Popen(
            [sys.executable, "-m", "support.fuse_child", "--config-json", str(self.config_json),
             "--fuse-fd", str(descriptor), "--ready-fd", str(writer)],
            pass_fds=(descriptor, writer),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        os.close(writer)
        with open(reader, "rb") as pipe:
            assert pipe.read(1) == b"R"
        return process


@contextmanager
def connected(tmp_path: Path) -> Iterator[Connection]:
    """Mount a connection that nobody serves yet."""
    directory = RunDirectory(tmp_path / "run")
    directory.prepare(tmp_path / "state")
    directory.blocks.mkdir()
    (tmp_path / "state" / "disk").write_bytes(bytes(DISK_BYTES))
    configuration = Configuration(state_dir=tmp_path / "state", run_dir=directory.path)
    config_json = tmp_path / "configuration.json"
    config_json.write_text(configuration.model_dump_json())
    mount = FuseMount.create(directory.blocks, directory.init_request)
    try:
        yield Connection(mount, directory, config_json)
    finally:
        mount.unmount()
        assert unmount_stale(directory.blocks) == 0


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[Connection]:
    """A mounted connection that nobody serves yet."""
    with connected(tmp_path) as connection:
        yield connection


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_open_file_goes_on_with_the_next_server(
    connection: Connection, number: signal.Signals
) -> None:
    """A file opened under the first server is read and written under the third, no error between."""
    server = connection.serve()
    with subprocess.Popen(
        [sys.executable, "-c", READER, str(connection.directory.blocks / "disk")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as reader:  # fmt: skip
        assert reader.stdin is not None and reader.stdout is not None
        assert reader.stdout.readline() == "open\n"
        for turn in range(3):
            reader.stdin.write(f"{turn}\n")
            reader.stdin.flush()
            assert reader.stdout.readline() == "True\n"
            server.send_signal(number)
            server.wait()
            reader.stdin.write(f"{turn + 100}\n")  # waits in the kernel meanwhile
            reader.stdin.flush()
            if connection.mount.can_resend:
                connection.mount.resend()
            server = connection.serve()
            assert reader.stdout.readline() == "True\n"
        reader.stdin.close()
    server.kill()
    server.wait()


def test_server_that_dies_before_its_first_answer_harms_nobody(connection: Connection) -> None:
    """As long as FUSE_INIT has no answer nothing is sent again, and a later server serves."""
    for _ in range(3):
        if connection.mount.can_resend:
            connection.mount.resend()  # what follows the death of a server that had said nothing
    server = connection.serve()
    try:
        for _ in range(2):
            done = subprocess.run(
                ["head", "-c", "1", str(connection.directory.blocks / "image")],
                check=False, capture_output=True, timeout=20,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            server.kill()
            server.wait()
            if connection.mount.can_resend:
                connection.mount.resend()
            server = connection.serve()
    finally:
        server.kill()
        server.wait()


def test_server_killed_amid_its_first_requests_fails_none(tmp_path: Path) -> None:
    """However young servers are killed, no request fails: what it is copied into is in memory."""
    done = tmp_path / "done"
    with connected(tmp_path) as connection:
        disk, descriptor = connection.directory.blocks / "disk", connection.mount.descriptor
        with subprocess.Popen(
            [sys.executable, "-m", "support.fuse_deaths", str(connection.config_json),
             str(descriptor), str(DEATHS)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(descriptor,),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        ) as deaths:  # fmt: skip
            writers = [
                subprocess.Popen(
                    [sys.executable, "-c", WRITER, str(disk), str(number), str(done)],
                    stdout=subprocess.PIPE, text=True,
                )
                for number in range(WRITERS)
            ]  # fmt: skip
            assert deaths.stdout is not None
            try:
                assert deaths.stdout.readline() == b"the last one lives\n"
            finally:
                done.touch()
            said = [writer.communicate(timeout=60)[0] for writer in writers]
            deaths.communicate(timeout=60)
    for line in said:
        count, errors = line.split(maxsplit=1)
        assert errors == "[]\n"
        assert int(count) > 0


def test_init_request_is_kept_privately(connection: Connection) -> None:
    """The recorded request is the kernel's FUSE_INIT, readable by root only."""
    request = connection.directory.init_request.read_bytes()
    length, opcode = struct.unpack_from("<II", request)

    assert (length, opcode) == (len(request), 26)
    assert stat.S_IMODE(connection.directory.init_request.stat().st_mode) == 0o600
    release = tuple(map(int, os.uname().release.split(".")[:2]))
    assert connection.mount.can_resend == (release >= (6, 9))


def _read_ahead_kib(mount_point: Path) -> int:
    device = _mounts_at(mount_point)[-1].device  # a stat would wait where nobody serves
    return int(Path("/sys/class/bdi", device, "read_ahead_kb").read_text())


def test_kernel_reads_far_ahead(connection: Connection) -> None:
    """Whoever serves, the kernel asks for a mebibyte at a time from who reads in order."""
    for _ in range(2):
        server = connection.serve()
        assert _read_ahead_kib(connection.directory.blocks) == 1024
        server.kill()
        server.wait()


def test_supervisor_killed_while_it_widened_harms_no_later_one(tmp_path: Path) -> None:
    """The file system of controls that a dead supervisor left mounted keeps no limit narrow."""
    control = tmp_path / "run" / "fusectl"
    control.mkdir(parents=True)
    subprocess.run(["mount", "-t", "fusectl", "stratocache", control], check=True)
    with connected(tmp_path) as connection:
        assert _read_ahead_kib(connection.directory.blocks) == 1024
    assert mounted_at(control) == []


def test_modes_are_enforced_by_the_kernel(connection: Connection) -> None:
    """Another user reads what everybody may read, and not the disk."""
    server = connection.serve()
    for folder in connection.directory.blocks.parents:
        if folder.is_relative_to("/tmp/") and folder != Path("/tmp"):
            folder.chmod(folder.stat().st_mode | 0o011)
    try:
        for name, status in (("image", 0), ("disk", 1)):
            done = subprocess.run(
                ["head", "-c", "1", str(connection.directory.blocks / name)],
                check=False, capture_output=True, user=65534,
            )  # fmt: skip
            assert done.returncode == status, done.stderr
    finally:
        server.kill()
        server.wait()


def test_unmount_frees_whoever_waits(connection: Connection) -> None:
    """A reader that waits for a server which never comes gets an error, not a hang, at the end."""
    with subprocess.Popen(
        ["cat", str(connection.directory.blocks / "disk")],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    ) as reader:  # fmt: skip
        with pytest.raises(subprocess.TimeoutExpired):
            reader.wait(0.2)
        assert connection.mount.connected
        subprocess.run(["umount", "-f", "-l", str(connection.directory.blocks)], check=True)
        assert reader.wait(10) != 0

    assert not connection.mount.connected


def test_no_memory_of_a_server_is_brought_in_when_it_is_used(connection: Connection) -> None:
    """All that a server may write to is in memory, what it allocated while it served as well."""
    server = connection.serve()
    try:
        (connection.directory.blocks / "disk").write_bytes(bytes(DISK_BYTES))
        absent = {
            region: sizes
            for region, sizes in _regions(server.pid).items()
            if region.split()[1].startswith("rw") and sizes["Rss"] < sizes["Size"]
        }
    finally:
        server.kill()
        server.wait()
    assert absent == {}


def _regions(pid: int) -> dict[str, dict[str, int]]:
    """Return the mappings of a process with their sizes in KiB (proc_pid_smaps(5))."""
    regions: dict[str, dict[str, int]] = {}
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if " " in name:
            sizes = regions[line] = {}
        elif value.endswith(" kB"):
            sizes[name] = int(value.split()[0])
    return regions
