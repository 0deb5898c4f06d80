"""Hot plug by the command line, where the machine or its monitor is not what one would wish."""

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support.api_daemon import Api, insert_disk, listens, serving, standing_in
from support.command_line import error, run_alone
from support.plugging import paused_qemu, seen

from stratocache.api.attachment_views import AttachmentView
from stratocache.api.command_line import command_line
from stratocache.api.guest_disk import Handout
from stratocache.cache.configuration import Configuration, IscsiSettings
from stratocache.fs import attachment_intents, inventory
from stratocache.fs.records import Caller

pytestmark = [pytest.mark.root, pytest.mark.vm]

ROOT = Caller("root", "admin")
UUID = "0f1e2d3c-4b5a-4697-8877-665544332211"
NOWHERE = "qemu+unix:///session?socket=/nonexistent"

Run = Callable[..., Result]


@pytest.fixture
def run(configuration: Configuration, api: Api) -> Iterator[Run]:
    """Runs commands on a served database; no target is served where attachments say."""

    def invoke(*arguments: str) -> Result:
        flags = ["--run-dir", str(configuration.run_dir)]
        return CliRunner().invoke(command_line, [*flags, *arguments])

    with serving(configuration), standing_in(api.db):
        yield invoke


@pytest.fixture
def monitor(configuration: Configuration) -> Iterator[Path]:
    """The monitor of a real QEMU that has not started its guest."""
    path = configuration.run_dir / "qmp"
    with paused_qemu(path):
        yield path


def attached(api: Api, uuid: str) -> list[str]:
    """Return the instances that have a disk."""
    return [item.instance for item in inventory.attachments(api.db, disk_uuid=uuid)]


def attach_by_hand(api: Api, run: Run) -> str:
    """Attach a new disk without plugging it."""
    uuid = insert_disk(api.db)
    assert run("disk", "attach", uuid, "--instance", "vm").exit_code == 0
    return uuid


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("attach", "--instance", "x", "--qmp", "a", "--domain", "b"), "either --qmp or --domain"),
        (("attach", "--instance", "x", "--libvirt", "a:///"), "goes with --domain"),
        (("attach", "--instance", "x", "--bus", "scsi"), "go with --qmp or --domain"),
        (("attach", "--instance", "x", "--qmp", "a", "--bus", "floppy"), "--bus"),
        (("detach", "--timeout", "5"), "go with --qmp or --domain"),
        (("detach", "--qmp", "a", "--timeout", "0"), "--timeout"),
    ],
)
def test_wrong_options_are_refused(options: tuple[str, ...], complaint: str) -> None:
    """Options that contradict each other, or say nothing alone, end with status 2 and a reason."""
    result = run_alone("disk", options[0], UUID, *options[1:])

    assert result.exit_code == 2
    assert complaint in result.stderr


def test_absent_monitor_attaches_nothing(api: Api, run: Run, tmp_path: Path) -> None:
    """Where no QEMU listens, attaching says how to start one, and the disk stays free."""
    uuid = insert_disk(api.db)

    result = run("disk", "attach", uuid, "--instance", "vm", "--qmp", str(tmp_path / "none"))

    assert "server=on" in error(result, 10, "qemu-unreachable")
    assert attached(api, uuid) == []


def test_refused_disk_is_detached_again(api: Api, run: Run, monitor: Path) -> None:
    """When QEMU cannot open the disk, its reason is told; neither it nor we keep anything."""
    uuid = insert_disk(api.db)
    before = seen(monitor)

    result = run("disk", "attach", uuid, "--instance", "vm", "--qmp", str(monitor))

    assert "onnect" in error(result, 4, "plug-refused")
    assert attached(api, uuid) == []
    assert seen(monitor) == before


def test_attachment_of_another_command_stays(api: Api, run: Run, monitor: Path) -> None:
    """What was attached before is still attached when plugging it fails."""
    uuid = attach_by_hand(api, run)

    result = run("disk", "attach", uuid, "--instance", "vm", "--qmp", str(monitor))

    error(result, 4, "plug-refused")
    assert attached(api, uuid) == ["vm"]


def test_monitor_in_use_is_not_waited_for_long(api: Api, run: Run, monitor: Path) -> None:
    """A monitor that somebody else holds is given up after the time-out."""
    uuid = insert_disk(api.db)
    with socket.socket(socket.AF_UNIX) as holder:
        holder.connect(str(monitor))
        holder.recv(1)
        result = run(
            "disk", "attach", uuid, "--instance", "vm", "--qmp", str(monitor), "--timeout", "1"
        )

    error(result, 10, "qmp-busy")
    assert attached(api, uuid) == []


def test_ctrl_c_takes_everything_back(
    api: Api, configuration: Configuration, monitor: Path
) -> None:
    """SIGINT while QEMU logs in to a portal that does not answer leaves nothing in it or in us."""
    uuid = insert_disk(api.db)
    before = seen(monitor)
    with socket.create_server(("127.0.0.1", 0)) as portal:
        port = portal.getsockname()[1]
        silent = configuration.model_copy(update={"iscsi": IscsiSettings(port=port)})
        with serving(silent), standing_in(api.db), subprocess.Popen(
            [sys.executable, "-m", "stratocache", "--run-dir", str(configuration.run_dir),
             "disk", "attach", uuid, "--instance", "vm", "--qmp", str(monitor)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as command:  # fmt: skip
            try:
                portal.settimeout(30)
                connection, _ = portal.accept()
                command.send_signal(signal.SIGINT)
                portal.close()
                connection.close()  # now QEMU's login fails, and it listens to us again
                stdout, stderr = command.communicate(timeout=60)
            finally:
                command.kill()

    assert (command.returncode, stdout) == (1, "")
    assert stderr.endswith("[interrupted]\n")
    assert attached(api, uuid) == []
    assert seen(monitor) == before


@pytest.mark.parametrize("greeting", [b"SSH-2.0-x\r\n", b"[]\n", b"{}\n", b"x" * 100, b""])
def test_what_is_no_monitor_is_said(api: Api, run: Run, tmp_path: Path, greeting: bytes) -> None:
    """A socket on which something else answers is refused, and nothing is attached."""
    uuid = insert_disk(api.db)
    path = tmp_path / "other"

    def answer(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.sendall(greeting)

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        thread = threading.Thread(target=answer, args=(server,))
        thread.start()
        result = run("disk", "attach", uuid, "--instance", "vm", "--qmp", str(path))
        thread.join()

    assert result.exit_code == 10, result.output
    assert result.stderr.count("\n") == 1
    assert attached(api, uuid) == []


def test_machine_that_ended_has_let_go(api: Api, run: Run, configuration: Configuration) -> None:
    """Detaching from a QEMU that has ended, or a domain that is no more, is detaching."""
    stale = configuration.run_dir / "qmp"
    with paused_qemu(stale):
        pass
    assert stale.exists() and not listens(stale)
    places = [("--qmp", str(stale)), ("--domain", "no-such", "--libvirt", "test:///default")]
    for place in places:
        uuid = attach_by_hand(api, run)
        result = run("disk", "detach", uuid, *place, "--json")

        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout) == {
            "detached": uuid, "instance": "vm", "unplugged": False
        }  # fmt: skip
        assert attached(api, uuid) == []


def test_wrong_socket_detaches_nothing(api: Api, run: Run, monitor: Path) -> None:
    """A path without a socket is no proof that QEMU has ended: the disk stays attached."""
    uuid = attach_by_hand(api, run)

    result = run("disk", "detach", uuid, "--qmp", f"{monitor}-mistyped")

    assert "without --qmp" in error(result, 10, "qemu-unreachable")
    assert attached(api, uuid) == ["vm"]


@pytest.mark.parametrize(
    ("domain", "uri", "status", "code"),
    [
        ("no-such", "test:///default", 3, "domain-unknown"),
        ("--help", "test:///default", 3, "domain-unknown"),
        ("test", "test:///default", 4, "plug-refused"),
        ("test", NOWHERE, 10, "libvirt-unreachable"),
        ("test", "no scheme", 10, "libvirt-unreachable"),
    ],
)
def test_domain_that_takes_no_disk(
    api: Api, run: Run, domain: str, uri: str, status: int, code: str
) -> None:
    """A domain that is not there, or a libvirt that cannot, is said; nothing stays attached."""
    uuid = insert_disk(api.db)

    place = (f"--domain={domain}", "--libvirt", uri)
    result = run("disk", "attach", uuid, "--instance", "vm", *place)

    error(result, status, code)
    assert attached(api, uuid) == []


def test_silent_libvirt_keeps_the_attachment(api: Api, run: Run) -> None:
    """When libvirt does not answer nobody knows what the guest has: the disk stays attached."""
    uuid = attach_by_hand(api, run)

    result = run("disk", "detach", uuid, "--domain", "test", "--libvirt", NOWHERE)

    error(result, 10, "libvirt-unreachable")
    assert attached(api, uuid) == ["vm"]


def test_handout_is_what_a_launcher_gets(api: Api, configuration: Configuration) -> None:
    """What is plugged are the node, the device and the secret of the answer, with QMP's types."""
    uuid = insert_disk(api.db)
    initiator = "iqn.2026-11.org.example:host"
    operation = attachment_intents.attach(
        api.db, ROOT, uuid, instance="vm", access="ro", initiator=initiator
    )
    attachment = inventory.attachment(api.db, operation.subject)
    secret = api.db.secrets.open(attachment.id, attachment.sealed_secret)
    view = AttachmentView.of(configuration, api.db.secrets, ROOT, attachment, 0).model_dump()

    handout = Handout.of(view)
    stranger = Handout.of({**view, "chap": None})

    assert handout.blockdev == {
        "driver": "iscsi", "node-name": handout.node, "transport": "tcp",
        "portal": "127.0.0.1:1", "target": view["target_iqn"], "lun": 1,
        "user": attachment.chap_username, "password-secret": handout.secret_id,
        "discard": "unmap", "initiator-name": initiator, "read-only": True,
    }  # fmt: skip
    assert handout.device == {
        "driver": "virtio-blk-pci", "drive": handout.node, "serial": handout.serial,
        "werror": "stop", "rerror": "stop",
    }  # fmt: skip
    assert handout.require_secret() == secret
    assert secret not in repr(handout)
    with pytest.raises(Exception, match="not shown to you"):
        stranger.require_secret()
