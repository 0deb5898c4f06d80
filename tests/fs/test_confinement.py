"""What the processes of an appliance may still do, as the kernel says and as they find out."""

import json
import os
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.appliance import Appliance, free_port
from support.publishing import publish_image

from stratocache.fs.confinement import (
    CAP_IPC_LOCK,
    CAP_NET_BIND_SERVICE,
    CAP_SYS_RESOURCE,
    Confinement,
    Prepared,
    configured_paths,
    landlock_version,
)
from stratocache.fs.privileges import Privileges
from stratocache.fs.processes import Child, Launch

pytestmark = pytest.mark.root

OF_TGTD = {CAP_IPC_LOCK, CAP_NET_BIND_SERVICE, CAP_SYS_RESOURCE}
CAPABILITIES: dict[str, set[int]] = {
    "stratocache.fs.standby": {CAP_IPC_LOCK},  # blockd and its spare
    "stratocache.api.server": set(),
    "stratocache.api.web_server": set(),
    "stratocache.fs.holder": set(),
    "tgtd": OF_TGTD,
}
# Tries each thing and prints the error's name, or what came of it.
PROBE = """
import ctypes, errno, json, os, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
def tried(what, *arguments):
    try:
        return repr(what(*arguments))
    except OSError as error:
        return errno.errorcode[error.errno]
def called(number, *arguments):
    return "done" if libc.syscall(number, *arguments) == 0 else errno.errorcode[ctypes.get_errno()]
def connect(port):
    with socket.socket() as client:
        client.settimeout(20)
        return client.connect(("127.0.0.1", port))
def bind(port):
    with socket.socket() as server:
        return server.bind(("127.0.0.1", port))
own, other, allowed, forbidden, parent = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
open(own + "/a", "w").write("x")
os.mkdir(own + "/b")
os.link(own + "/a", own + "/b/c")
print(json.dumps({
    "moved": tried(os.rename, own + "/b/c", own + "/d"),
    "write elsewhere": tried(open, other + "/new", "w"),
    "overwrite elsewhere": tried(open, other + "/old", "r+"),
    "read elsewhere": tried(open, other + "/old"),
    "list elsewhere": tried(os.listdir, other),
    "read the system": tried(lambda: len(open("/etc/passwd").read()) > 0),
    "write the system": tried(open, "/etc/hosts", "a"),
    "raw disk": tried(os.open, sys.argv[6] if len(sys.argv) > 6 else "/dev/loop-control", os.O_RDWR),
    "chown": tried(os.chown, own + "/a", 1, 1),
    "connect": tried(connect, allowed),
    "connect elsewhere": tried(connect, forbidden),
    "bind": tried(bind, allowed),
    "signal outside": tried(os.kill, parent, 0),
    "mount": called(165, b"none", own.encode(), b"tmpfs", 0, None),
    "unshare": called(272, 0x10000000),
    "ptrace": called(101, 16, parent, 0, 0),
    "bpf": called(321, 0, 0, 0),
    "set-user-ID": open("/proc/self/status").read().split("NoNewPrivs:")[1].split()[0],
}))
"""


def _capabilities(pid: int, kind: str) -> set[int]:
    status = Path(f"/proc/{pid}/status").read_text()
    bits = int(next(line for line in status.splitlines() if line.startswith(kind)).split()[1], 16)
    return {number for number in range(64) if bits >> number & 1}


def _field(pid: int, name: str) -> str:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(line.split()[1] for line in status.splitlines() if line.startswith(name + ":"))


UNIT = Path(__file__).parents[2] / "packaging/systemd/stratocache.service"


class Limited(Appliance):
    """An appliance that gets the capabilities which our unit of systemd gives it."""

    def command(self, *arguments: str) -> list[str]:
        """Return a command line under setpriv(1)."""
        words = " ".join(
            line.partition("=")[2]
            for line in UNIT.read_text().splitlines()
            if line.startswith("CapabilityBoundingSet=")
        )
        kept = ",".join(f"+{name.removeprefix('CAP_').lower()}" for name in words.split())
        limits = ["setpriv", "--no-new-privs", "--bounding-set", f"-all,{kept}"]
        return [*limits, *super().command(*arguments)]


def test_each_process_has_what_it_needs_and_no_more(tmp_path: Path) -> None:
    """An appliance runs with what the unit of systemd gives it. Every process but the supervisor has
    the capabilities of its kind, can get no others, and is filtered, after a restart too."""
    published = publish_image(tmp_path / "published", 1024**2)
    with Limited(
        tmp_path / "appliance", endpoint=published.endpoint, fingerprint=published.fingerprint,
        extra=f'api.address = "127.0.0.1"\napi.port = {free_port()}\napi.workers = 1',
    ) as appliance:  # fmt: skip
        ours = _capabilities(os.getpid(), "CapPrm")
        for pid in appliance.pids("stratocache.api.server"):
            os.kill(pid, signal.SIGKILL)
        assert appliance.json("image", "fetch", published.identifier)["state"] == "verified"
        disk = appliance.json("disk", "create", "--reference", published.identifier)
        assert appliance.json("disk", "attach", disk["uuid"], "--instance", "vm1")["target_iqn"]
        seen = set()
        for pid in appliance.pids():
            line = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            name = line[0].decode() if line[1] == b"-f" else line[2].decode()
            if name == "stratocache.fs.supervisor":
                assert len(_capabilities(pid, "CapEff")) < 12
                continue
            seen.add(name)
            expected = CAPABILITIES[name] & ours
            for kind in ("CapPrm", "CapEff", "CapBnd"):
                assert _capabilities(pid, kind) == expected, (name, kind)
            assert _capabilities(pid, "CapInh") == _capabilities(pid, "CapAmb") == set()
            assert (_field(pid, "NoNewPrivs"), _field(pid, "Seccomp")) == ("1", "2"), name
    assert seen == CAPABILITIES.keys()


def _probe(confinement: Confinement, folder: Path, *ports: int) -> dict[str, str]:
    own, other = folder / "own", folder / "other"
    child = Child("probe", folder / "log")
    arguments = [str(own), str(other), *map(str, ports), str(os.getpid())]
    launch = Launch([sys.executable, "-c", PROBE, *arguments], confinement=confinement)
    child.start(launch)
    assert child.wait(60)
    text = (folder / "log").read_text()
    assert child.collect() == 0, text
    answers: dict[str, str] = json.loads(text.splitlines()[-1])
    return answers


def test_a_confined_process_finds_everything_else_closed(tmp_path: Path) -> None:
    """A server of requests writes and reads its own folders and reads the system, connects to its port
    alone, and can neither listen, mount, trace, signal others nor get its powers back."""
    assert landlock_version() >= 6
    for name in ("own", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "other/old").write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as portal, socket.create_server(
        ("127.0.0.1", 0)
    ) as private:  # fmt: skip
        ports = portal.getsockname()[1], private.getsockname()[1]
        rights = Privileges(tmp_path / "own", tmp_path / "own", ports[0], ())
        # tests are below the scratch folders, which are no part of what is looked at here
        answers = _probe(replace(rights.of_server("api"), scratch=()), tmp_path, *ports)

    denied = {
        "write elsewhere", "overwrite elsewhere", "read elsewhere", "list elsewhere",
        "write the system", "raw disk", "connect elsewhere", "bind",
    }  # fmt: skip
    assert {name: answers[name] for name in denied} == dict.fromkeys(denied, "EACCES")
    refused = {"chown", "signal outside", "mount", "unshare", "ptrace", "bpf"}
    assert {name: answers[name] for name in refused} == dict.fromkeys(refused, "EPERM")
    assert answers["set-user-ID"] == "1"
    assert (answers["moved"], answers["connect"]) == ("None", "None")
    assert answers["read the system"] == "True"


def test_blockd_reads_files_that_catalogues_name(tmp_path: Path) -> None:
    """`blockd` may read anywhere but devices, and connect everywhere; it writes its folders alone."""
    for name in ("own", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "other/old").write_text("image")
    with socket.create_server(("127.0.0.1", 0)) as origin:
        rights = Privileges(tmp_path / "own", tmp_path / "own", free_port(), ())
        port = origin.getsockname()[1]
        answers = _probe(replace(rights.of_blockd(), scratch=()), tmp_path, port, port)

    assert "TextIOWrapper" in answers["read elsewhere"]
    assert answers["connect"] == answers["connect elsewhere"] == "None"
    assert {answers[name] for name in ("write elsewhere", "raw disk", "write the system")} == {
        "EACCES"
    }


def test_what_is_configured_can_be_read(tmp_path: Path) -> None:
    """The folders of all files that a configuration names are found, whatever the keys, and those of
    what links lead to."""
    link = tmp_path / "live/c.pem"
    link.parent.mkdir()
    link.symlink_to(tmp_path / "archive/c1.pem")
    configuration = {
        "catalogues": {"a": {"policy_file": "/srv/policy/p.cfg", "endpoint": "http://x/y"}},
        "api": {"certificate_file": str(link), "group": "g", "port": 1},
        "hosts": ["a", "/b"],
    }

    assert set(configured_paths(configuration)) == {
        "/srv/policy", str(tmp_path / "live"), str(tmp_path / "archive"),
    }  # fmt: skip


def test_a_process_that_cannot_be_confined_does_not_run(tmp_path: Path) -> None:
    """Without its confinement a process ends, with a sentence in the log."""

    class Broken(Confinement):
        """Has lost its ruleset when it is needed."""

        def prepare(self) -> Prepared:
            """Return what cannot be entered."""
            prepared = super().prepare()
            prepared.close()
            prepared.ruleset = 2
            return prepared

    child = Child("probe", tmp_path / "log")
    child.start(Launch([sys.executable, "-c", "print('ran')"], confinement=Broken()))
    assert child.wait(60)

    assert child.collect() == 1
    assert (tmp_path / "log").read_text() == "this process cannot be confined\n"
