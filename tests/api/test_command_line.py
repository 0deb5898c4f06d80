"""The command line against the real API process."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from support.api_daemon import IMAGE_ID, ROOT, Api, insert_disk, insert_image, serving, standing_in
from support.command_line import error, run_alone
from support.lineage import add_disk, add_snapshot

from stratocache.api.command_line import command_line
from stratocache.api.launch_commands import qemu_command
from stratocache.api.progress import progress_text
from stratocache.api.session import plain
from stratocache.cache.configuration import Configuration
from stratocache.fs import image_intents, inventory

pytestmark = pytest.mark.root  # callers are root, or are made from root

Run = Callable[..., Result]


@pytest.fixture
def run(configuration: Configuration, api: Api) -> Iterator[Run]:
    """Runs commands on a served database whose operations are performed as they come."""

    def invoke(*arguments: str) -> Result:
        flags = ["--run-dir", str(configuration.run_dir)]
        return CliRunner().invoke(command_line, [*flags, *arguments])

    with serving(configuration), standing_in(api.db, holding="held"):
        yield invoke


def document(result: Result) -> Any:
    """Return the JSON that a command wrote, alone, on standard output."""
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


# -- without a daemon


def test_help_lists_every_command() -> None:
    """--help names all commands of the design, quickly, without importing them."""
    program = (
        "import sys; from stratocache.api.command_line import command_line\n"
        "try: command_line.main(['--help'])\n"
        "finally: print(sorted(sys.modules), file=sys.stderr)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    for name in ("serve", "doctor", "launch", "halt", "image", "disk", "operation", "marketplace"):
        assert f"\n  {name} " in shown.stdout
    assert "10 daemon not reachable" in " ".join(shown.stdout.split())
    for heavy in ("httpx", "falcon", "pydantic", "lxml", "trio", "rich"):
        assert f"'{heavy}'" not in shown.stderr


@pytest.mark.parametrize(
    "group",
    [["image"], ["disk"], ["operation"], ["launch"], ["halt"], ["serve"], ["doctor"],
     *(["image", name] for name in ("fetch", "ls", "show", "rm", "pin", "unpin", "mount", "umount")),
     *(["disk", name] for name in ("create", "ls", "show", "rm", "set", "attach", "detach",
                              "migrate", "lease")),
     *(["operation", name] for name in ("ls", "show", "cancel"))],
)  # fmt: skip
def test_every_command_has_help(group: list[str]) -> None:
    """Each command explains itself, and all that answer something take --json."""
    result = run_alone(*group, "--help")

    assert result.exit_code == 0
    assert "Usage: stratocache" in result.stdout
    if len(group) == 2 or group[0] in ("launch", "halt", "doctor"):
        assert "--json" in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["disk", "nothing"],
        ["disk", "create", "--size", "big"],
        ["disk", "create", "--kind", "floppy"],
        ["disk", "set", "x"],
        ["cache", "plan", "--offline", "--fix", "--watch"],
        ["launch", "REF"],
        ["launch", "REF", "--instance", "x", "--print", "csv"],
        ["--colour", "disk", "ls"],
        ["serve", "--set", "novalue"],
    ],
)
def test_usage_errors_exit_2(arguments: list[str]) -> None:
    """Wrong usage is one error line and exit status 2."""
    error(run_alone(*arguments), 2, "usage")


def test_missing_daemon_exits_10(tmp_path: Path) -> None:
    """Without a daemon: exit status 10, as a line or as JSON, never a traceback."""
    socket_path = str(tmp_path / "api.sock")

    line = error(run_alone("--socket", socket_path, "disk", "ls"), 10, "daemon-unreachable")
    assert socket_path in line
    for arguments in (["--json", "disk", "ls"], ["disk", "ls", "--json"]):
        result = run_alone("--socket", socket_path, *arguments)
        record = json.loads(result.stderr)
        assert result.exit_code == 10
        assert result.stdout == ""
        assert record["code"] == "daemon-unreachable"
        assert record["exit_status"] == 10


def test_bad_configuration_exits_2(tmp_path: Path) -> None:
    """A configuration that cannot be used is an error before anything is asked."""
    path = tmp_path / "stratocache.toml"
    path.write_text("colour = 'red'\n")

    assert "colour" in error(
        run_alone("--config", str(path), "disk", "ls"), 2, "configuration-invalid"
    )
    missing = run_alone("--config", str(tmp_path / "no.toml"), "disk", "ls")
    error(missing, 2, "configuration-missing")


def test_run_dir_flag_moves_the_socket(tmp_path: Path) -> None:
    """--run-dir says where the daemon's socket is."""
    line = error(run_alone("--run-dir", str(tmp_path), "disk", "ls"), 10, "daemon-unreachable")

    assert f"{tmp_path}/api.sock" in line


def test_libvirt_runner_is_refused_before_launching() -> None:
    """What cannot be run is said before a disk is cloned."""
    result = run_alone("launch", "REF", "--instance", "x", "--run", "libvirt")

    error(result, 2, "runner-unsupported")


def test_qemu_command_is_whole() -> None:
    """--run qemu has memory, accelerator and serial console beside the disks."""
    command = qemu_command(["-blockdev", "x"], 256 * 1024**2, "tcg")

    assert command[0] == "qemu-system-x86_64"
    assert command[command.index("-accel") + 1] == "tcg"
    assert command[command.index("-m") + 1] == "256M"
    assert command[-2:] == ["-blockdev", "x"]


def test_qemu_command_with_a_monitor_takes_more_disks() -> None:
    """--qmp adds a monitor on that socket and ports for disks that are plugged later."""
    command = qemu_command([], 256 * 1024**2, "tcg", Path("/run/a,b"))

    assert command[command.index("-qmp") + 1] == "unix:/run/a,,b,server=on,wait=off"
    ports = [argument for argument in command if argument.startswith("pcie-root-port,")]
    assert len(set(ports)) == len(ports) == 8


def test_control_characters_do_not_reach_the_terminal() -> None:
    """Text from a catalogue cannot steer a terminal or break a line."""
    assert plain("a\x1b[2Jb\nc\x9b") == "a?[2Jb?c?"
    assert plain(None) == "-"
    assert plain(True) == "yes"


def test_progress_is_written_for_people() -> None:
    """Bytes, total and percent; without a total, bytes."""
    assert progress_text(12 * 1024**2, 100 * 1024**2) == "12 MiB of 100 MiB (12 %)"
    assert progress_text(1024, None) == "1 KiB"
    assert progress_text(0, 0) == "0 B"


# -- with a daemon


def test_disk_commands(run: Run) -> None:
    """The life of a disk: create, ls, show, set, rm."""
    uuid = run("disk", "create", "--size", "10M", "--tag", "my tag").stdout.strip()

    assert document(run("disk", "show", uuid, "--json"))["size_bytes"] == 10 * 1024**2
    assert run("disk", "ls").stdout.splitlines() == [
        "UUID\tSTATE\tSIZE\tFORM\tOWNER\tTAG\tATTACHED",
        f"{uuid}\tavailable\t10 MiB\traw\troot\tmy tag\t-",
    ]
    assert run("disk", "set", uuid, "--tag", "new", "--visibility", "public").exit_code == 0
    assert document(run("--json", "disk", "ls"))["disks"][0]["tag"] == "new"
    assert f"uuid: {uuid}\n" in run("disk", "show", uuid).stdout
    assert run("disk", "rm", uuid).exit_code == 0
    error(run("disk", "show", uuid), 3, "disk-unknown")


@pytest.fixture
def no_iscsid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An iscsiadm that finds its daemon missing, whatever this machine has."""
    program = tmp_path / "iscsiadm"
    program.write_text("#!/bin/sh\nexit 20\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


@pytest.mark.usefixtures("no_iscsid")
def test_attachment_without_login_is_undone(run: Run) -> None:
    """When this host cannot log in, what attach --open-iscsi made goes, what was there stays."""
    uuid = document(run("disk", "create", "--size", "1M", "--json"))["uuid"]
    attach = ("disk", "attach", uuid, "--instance", "vm-1")

    error(run(*attach, "--open-iscsi"), 10, "iscsid-not-running")
    assert document(run("disk", "show", uuid, "--json"))["attached_to"] == []
    document(run(*attach, "--json"))
    error(run(*attach, "--open-iscsi"), 10, "iscsid-not-running")
    assert document(run("disk", "show", uuid, "--json"))["attached_to"] == ["vm-1"]


def test_detaching_here_what_is_not_attached_is_fine(run: Run) -> None:
    """detach --open-iscsi may be repeated."""
    uuid = document(run("disk", "create", "--size", "1M", "--json"))["uuid"]

    assert run("disk", "detach", uuid, "--open-iscsi").exit_code == 0


def test_attach_and_detach_commands(run: Run) -> None:
    """attach writes how to reach the disk; detach finds the attachment by itself."""
    uuid = document(run("disk", "create", "--size", "1M", "--json"))["uuid"]
    shown = document(run("disk", "attach", uuid, "--instance", "vm-1", "--json"))

    assert shown["iscsi_url"].startswith("iscsi://")
    error(run("disk", "attach", uuid, "--instance", "vm-2"), 4, "disk-attached")
    error(run("disk", "rm", uuid), 4, "disk-attached")
    error(run("disk", "detach", uuid, "--instance", "vm-2"), 3, "attachment-unknown")
    assert run("disk", "detach", uuid).exit_code == 0
    error(run("disk", "detach", uuid), 3, "attachment-unknown")
    for instance in ("a", "b"):
        run("disk", "attach", uuid, "--instance", instance, "--access", "ro")
    error(run("disk", "detach", uuid), 2, "attachment-ambiguous")
    assert "from a." in run("disk", "detach", uuid, "--instance", "a").stdout


def test_migrate_and_lease_commands(run: Run) -> None:
    """A disk is moved, back and for good; leases are renewed; a stale epoch changes nothing."""
    uuid = run("disk", "create", "--size", "1M").stdout.strip()
    error(run("disk", "migrate", uuid, "--to", "vm-2"), 3, "attachment-unknown")
    attach = ("disk", "attach", uuid, "--instance", "vm-1", "--lease", "60", "--json")
    first = document(run(*attach))
    assert run("disk", "migrate", uuid).exit_code == 2
    error(run("disk", "migrate", uuid, "--complete"), 3, "migration-unknown")
    assert (
        document(run("disk", "migrate", uuid, "--to", "vm-2", "--json"))["migrates"] == first["id"]
    )
    assert "stays" in run("disk", "migrate", uuid, "--abort").stdout
    assert run("disk", "migrate", uuid, "--to", "vm-2", "--timeout", "90").exit_code == 0
    error(run("disk", "detach", uuid), 2, "attachment-ambiguous")
    assert document(run("disk", "migrate", uuid, "--complete", "--json"))["instance"] == "vm-2"
    renewed = document(run("disk", "lease", uuid, "--lease", "90", "--json"))
    assert (renewed["instance"], renewed["lease_s"], renewed["epoch"]) == ("vm-2", 90, 3)
    error(run("disk", "detach", uuid, "--epoch", "1"), 4, "epoch-stale")
    assert run("disk", "detach", uuid, "--epoch", "3", "--force").exit_code == 0


def test_lease_of_an_instance_is_renewed(api: Api, run: Run) -> None:
    """`launch --lease` begins a lease and `lease` renews it; halt obeys an epoch."""
    insert_image(api.db)
    launched = document(run("launch", IMAGE_ID, "--instance", "vm1", "--lease", "60", "--json"))
    assert launched["lease_s"] == 60
    assert document(run("lease", "vm1", "--lease", "120", "--json"))["lease_s"] == 120
    error(run("lease", "vm2"), 3, "instance-unknown")
    stale = str(launched["epoch"] + 1)
    error(run("halt", "vm1", "--epoch", stale), 4, "epoch-stale")
    assert run("halt", "vm1", "--epoch", str(launched["epoch"])).exit_code == 0


def test_image_commands(run: Run) -> None:
    """fetch, ls, show, pin, unpin, rm."""
    assert run("image", "fetch", IMAGE_ID).stdout == f"{IMAGE_ID}\n"
    lines = run("image", "ls").stdout.splitlines()
    assert lines[1].split("\t") == [IMAGE_ID, "verified", "4 MiB", "no", "a small system"]
    assert document(run("image", "pin", IMAGE_ID, "--json"))["pinned"] is True
    error(run("image", "rm", IMAGE_ID), 4, "image-pinned")
    assert run("image", "unpin", IMAGE_ID).exit_code == 0
    assert document(run("image", "show", IMAGE_ID, "--json"))["pinned"] is False
    assert run("image", "rm", IMAGE_ID).exit_code == 0
    error(run("image", "show", IMAGE_ID), 3, "image-unknown")


def test_reference_is_explained_before_it_is_fetched(run: Run) -> None:
    """`image resolve` shows the entry, the others and the reason; what is refused exits 5."""
    lines = [
        f"image: {IMAGE_ID}, 4 MiB",
        "title: a small system",
        "here: no",
        "candidate: b@example.org of -: [entry-expired] It has? expired.",
    ]
    good, bad = run("image", "resolve", "ref"), run("image", "resolve", "refused")

    assert (good.exit_code, bad.exit_code) == (0, 5)
    assert good.stdout.splitlines() == ["ref: accepted: Because.", *lines]
    assert bad.stdout.splitlines() == ["refused: refused [endorser-refused]: Because.", *lines]
    assert document(run("image", "resolve", "ref", "--json"))["accepted"] is True


def test_image_that_is_not_served_cannot_be_mounted(
    api: Api, run: Run, configuration: Configuration, tmp_path: Path
) -> None:
    """mount says what is missing, umount what is not mounted; neither changes anything."""
    insert_image(api.db)
    api.db.connection.execute("UPDATE images SET state = 'fetching'")
    error(run("image", "mount", IMAGE_ID, str(tmp_path)), 4, "image-busy")
    api.db.connection.execute("UPDATE images SET state = 'verified'")

    line = error(run("image", "mount", IMAGE_ID, str(tmp_path)), 3, "image-unknown")
    assert str(configuration.blocks) in line
    error(run("image", "umount", str(tmp_path)), 2, "not-an-image-mount")


def test_launch_and_halt_commands(api: Api, run: Run) -> None:
    """launch writes what was asked for; asked again it writes the same; halt undoes it."""
    insert_image(api.db)
    uuid = insert_disk(api.db)
    command = [
        "launch", IMAGE_ID, "--instance", "vm-1", "--disk", uuid, "--readonly-disk", IMAGE_ID,
    ]  # fmt: skip

    shown = document(run(*command, "--print", "json"))
    assert [item["role"] for item in shown["attachments"]] == ["boot", "disk", "readonly"]
    assert document(run(*command, "--json")) == shown
    assert run(*command, "--print", "xml").stdout.strip() == shown["libvirt_xml"]
    assert run(*command, "--print", "qemu").stdout.split() == shown["qemu_args"]
    table = run(*command).stdout
    assert shown["boot"]["iscsi_url"] in table
    assert run("instance", "ls").stdout.splitlines()[1].split("\t")[:4] == [
        "vm-1", "active", IMAGE_ID, "3",
    ]  # fmt: skip
    assert document(run("instance", "show", "vm-1", "--json"))["epoch"] == shown["epoch"]
    assert "qemu_args" not in run("instance", "show", "vm-1").stdout
    held = document(run("attachment", "ls", "--instance", "vm-1", "--json"))["attachments"]
    assert [item["role"] for item in held] == ["boot", "disk", "readonly"]
    assert run("attachment", "ls", "--disk", uuid).stdout.count("\n") == 2
    assert run("halt", "vm-1").exit_code == 0
    error(run("halt", "vm-1"), 3, "instance-unknown")


def test_running_qemu_halts_the_instance_afterwards(api: Api, run: Run) -> None:
    """--run qemu starts QEMU on the disks; when it ends, here for want of a portal, all is undone."""
    insert_image(api.db)
    result = run(
        "launch", IMAGE_ID, "--instance", "vm-1", "--run", "qemu", "--accel", "tcg",
        "--memory", "64M",
    )  # fmt: skip

    error(result, 1, "qemu-failed")
    assert inventory.launches(api.db) == []
    assert inventory.attachments(api.db) == []
    assert inventory.disks(api.db, ROOT) == []


def test_operation_commands(api: Api, run: Run) -> None:
    """ls, show and cancel of operations."""
    operation = image_intents.request_fetch(api.db, ROOT, "held")

    assert operation.id in run("operation", "ls", "--state", "pending").stdout
    assert document(run("operation", "show", operation.id, "--json"))["subject"] == "held"
    assert "is cancelled" in run("operation", "cancel", operation.id).stdout
    assert document(run("operation", "ls", "--state", "pending", "--json")) == {"operations": []}


def test_strange_names_are_refused_not_misread(run: Run) -> None:
    """A name with slashes, dots or blanks is a name, not a path."""
    for name in ("../images", "a/b", "a?b=c", "a b", "é", "%2e%2e", "x" * 3000):
        assert run("disk", "show", name).exit_code in (2, 3)


def test_table_is_drawn_on_a_terminal(api: Api, run: Run, configuration: Configuration) -> None:
    """On a terminal lists are tables; what a catalogue wrote cannot mark them up."""
    insert_image(api.db, title="[bold]x[/bold]\x1b[31m")
    shown = _on_terminal(configuration, "image", "ls")

    assert "[bold]x[/bold]?[31m" in shown
    assert "───" in shown


def test_lineage_is_a_tree(api: Api, run: Run, configuration: Configuration) -> None:
    """`image show` draws what was made of an image on a terminal, and indents it elsewhere."""
    insert_image(api.db)
    disk = add_disk(api.db, tag="[red]x\x1b")
    snapshot = add_snapshot(api.db, disk)
    clone = add_disk(api.db, of=snapshot)

    shown = run("image", "show", IMAGE_ID).stdout.splitlines()
    drawn = _on_terminal(configuration, "image", "show", IMAGE_ID)

    assert shown[-3] == f"  disk {disk} ([red]x?): overlay, free"
    assert shown[-2].startswith(f"    snapshot {snapshot}: of ")
    assert shown[-1] == f"      disk {clone}: overlay, free"
    assert f"└── disk {disk} ([red]x?): overlay, free" in drawn
    assert f"        └── disk {clone}" in drawn
    assert document(run("image", "show", IMAGE_ID, "--json"))["disks"][0]["uuid"] == disk


def test_ctrl_c_cancels_a_fetch(api: Api, run: Run, configuration: Configuration) -> None:
    """SIGINT during `image fetch` cancels the operation and says so."""
    with subprocess.Popen(
        _command(configuration, "image", "fetch", "held"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            _wait_for_waiting(api, process)
            process.send_signal(signal.SIGINT)
            stdout, stderr = process.communicate(timeout=30)
        finally:
            process.kill()

    assert process.returncode == 1
    assert stdout == ""
    assert stderr.endswith("[cancelled]\n")
    assert inventory.operations(api.db)[0].state == "cancelled"


def test_closed_pipe_is_no_traceback(run: Run, configuration: Configuration, api: Api) -> None:
    """When nobody reads the output any more the command ends quietly."""
    command = " ".join(_command(configuration, "disk", "ls", "--json"))
    shown = subprocess.run(
        ["sh", "-c", f"{command} | true"], capture_output=True, text=True, check=False
    )

    assert "Traceback" not in shown.stderr


def _on_terminal(configuration: Configuration, *arguments: str) -> str:
    """Return what a command writes to a terminal; it must succeed."""
    master, slave = pty.openpty()
    with subprocess.Popen(
        _command(configuration, *arguments), stdout=slave, stderr=slave,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "160"},
    ) as process:  # fmt: skip
        os.close(slave)
        shown = _read_all(master)
    os.close(master)
    assert process.returncode == 0
    return shown


def _command(configuration: Configuration, *arguments: str) -> list[str]:
    return [
        sys.executable, "-m", "stratocache.api.command_line",
        "--socket", str(configuration.api_socket), *arguments,
    ]  # fmt: skip


def _wait_for_waiting(api: Api, process: subprocess.Popen[str]) -> None:
    """Return when the operation exists and the client has begun to wait for it."""
    deadline = time.monotonic() + 30
    while not inventory.operations(api.db) or not _sleeps_in_poll(process.pid):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)


def _sleeps_in_poll(pid: int) -> bool:
    return "State:\tS" in Path(f"/proc/{pid}/status").read_text()


def _read_all(descriptor: int) -> str:
    pieces = []
    while True:
        try:
            piece = os.read(descriptor, 65536)
        except OSError:  # the terminal's other side is closed
            break
        if not piece:
            break
        pieces.append(piece)
    return b"".join(pieces).decode()
