"""Disks that come to running guests and go again, by QEMU's monitor and by libvirt."""

import json
import socket as socket_module
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from stratodemo.guest import Guest
from support.appliance import Appliance
from support.guests import file_disk, system_image
from support.plugging import (
    PrivateLibvirt,
    pattern,
    pattern_digest,
    paused_qemu,
    plug_script,
    qmp,
    seen,
)

from stratocache.api.guest_disk import Handout

pytestmark = [pytest.mark.vm, pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(280)]

_BOOT_TIMEOUT_S = 120.0
_TIMEOUT_S = 60.0
_MACHINES = {
    "q35": ["-device", "pcie-root-port,id=plug1,chassis=1"],
    "pc": ["-machine", "pc"],
}


@pytest.fixture(scope="module")
def appliance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Appliance]:
    """A whole appliance without images."""
    root = tmp_path_factory.mktemp("appliance")
    with Appliance(root, endpoint="http://127.0.0.1:9", extra='log_level = "debug"') as running:
        yield running


def _new_disk(appliance: Appliance) -> str:
    status, disk = appliance.request("POST", "/v1/disks", {"size_bytes": 8 * 1024**2})
    assert status == 201, disk
    return str(disk["uuid"])


def _attachments(appliance: Appliance, uuid: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = appliance.request("GET", f"/v1/disks/{uuid}/attachments")[1][
        "attachments"
    ]
    return found


def _serial(uuid: str) -> str:
    return uuid.replace("-", "")[:20]


def _refused(appliance: Appliance, status: int, code: str, *arguments: str) -> None:
    done = appliance.run(*arguments)
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    assert done.stderr.endswith(f" [{code}]\n"), done.stderr


def _data(appliance: Appliance, uuid: str) -> bytes:
    return (appliance.state_dir / "disks" / uuid / "data").read_bytes()


def _secret_is_nowhere(secret: str, *folders: Path) -> None:
    """Look for a secret on command lines and in files, state.db and secrets/ apart."""
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            shown = process.read_bytes()
        except OSError:
            continue
        assert secret.encode() not in shown, shown
    grep = ["grep", "-rlF", "--exclude-dir=blocks", "--exclude=state.db*", "-e", secret]
    found = subprocess.run(
        [*grep, "--exclude-dir=secrets", *folders], check=False, capture_output=True, text=True
    )
    assert found.stdout == ""


@pytest.mark.parametrize("machine", ["q35", "pc"])
def test_disks_come_and_go_in_qemu(appliance: Appliance, tmp_path: Path, machine: str) -> None:
    """A guest sees a disk come and go as virtio and as SCSI, with its data; IDE is refused."""
    first, second = _new_disk(appliance), _new_disk(appliance)
    socket = tmp_path / "qmp"
    place = ("--instance", machine, "--qmp", str(socket))
    monitors = [argument for path in (socket, tmp_path / "watch")
                for argument in ("-qmp", f"unix:{path},server=on,wait=off")]  # fmt: skip
    disks = file_disk(system_image(), boot=True, readonly=True)
    with Guest([*disks, *_MACHINES[machine], *monitors], plug_script(3), name=machine) as guest:
        guest.wait_for("ready", _BOOT_TIMEOUT_S)
        before = seen(tmp_path / "watch")
        _refused(appliance, 4, "bus-no-hotplug", "disk", "attach", first, *place, "--bus", "ide")
        assert _attachments(appliance, first) == []
        assert seen(tmp_path / "watch") == before

        made = appliance.json("disk", "attach", first, *place)
        assert made["plug"]["guest_device"] == f"/dev/disk/by-id/virtio-{_serial(first)}"
        assert made["plug"]["node_name"] in seen(tmp_path / "watch")
        assert guest.wait_for("disk-1", _TIMEOUT_S) == f"vdb {_serial(first)}"
        secret = _attachments(appliance, first)[0]["chap"]["secret"]
        assert secret not in json.dumps(made)
        _secret_is_nowhere(secret, appliance.root, tmp_path)
        again = appliance.json("disk", "attach", first, *place)
        assert again == {**made, "plug": {**made["plug"], "already_plugged": True}}
        _refused(
            appliance, 4, "plugged-otherwise", "disk", "attach", first, *place, "--bus", "scsi"
        )
        assert len(_attachments(appliance, first)) == 1
        if machine == "q35":
            _refused(appliance, 4, "no-hotplug-slot", "disk", "attach", second, *place)
            assert _attachments(appliance, second) == []

        gone = appliance.json("disk", "detach", first, *place)
        assert gone == {"detached": first, "instance": machine, "unplugged": True}
        assert guest.wait_for("gone-1", _TIMEOUT_S) == "vdb"
        assert _attachments(appliance, first) == []
        assert seen(tmp_path / "watch") == before

        made = appliance.json("disk", "attach", first, *place, "--bus", "scsi")
        assert made["plug"]["guest_device"].endswith(f"scsi-0QEMU_QEMU_HARDDISK_{_serial(first)}")
        assert guest.wait_for("disk-2", _TIMEOUT_S) == f"sda {_serial(first)}"
        assert guest.wait_for("read-2", _TIMEOUT_S) == pattern_digest(1)
        shown = appliance.run("disk", "attach", second, *place, "--bus", "scsi")
        assert f"is plugged into {machine} as /dev/disk/by-id/scsi-" in shown.stdout, shown.stderr
        appliance.json("disk", "detach", first, *place)
        assert guest.wait_for("disk-3", _TIMEOUT_S) == f"sdb {_serial(second)}"
        appliance.json("disk", "detach", second, *place)
        assert guest.finish(_TIMEOUT_S)["read-3"] == pattern_digest(0)
    assert _data(appliance, first).startswith(pattern(2))
    assert _data(appliance, second).startswith(pattern(3))


def test_guest_that_keeps_a_disk_keeps_the_attachment(appliance: Appliance, tmp_path: Path) -> None:
    """A disk that the guest, here one that does not run, does not give back stays attached."""
    uuid = _new_disk(appliance)
    socket, watch = tmp_path / "qmp", tmp_path / "watch"
    place = ("--instance", "kept", "--qmp", str(socket))
    with paused_qemu(socket, watch) as qemu:
        node = appliance.json("disk", "attach", uuid, *place)["plug"]["node_name"]
        for _ in range(2):  # the second time QEMU says that it has asked already
            _refused(
                appliance, 4, "unplug-timeout", "disk", "detach", uuid, *place, "--timeout", "1"
            )
            assert len(_attachments(appliance, uuid)) == 1
            assert node in seen(watch)
        waiting = subprocess.Popen(
            appliance.command("disk", "detach", uuid, *place, "--json"),
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        with waiting:
            _wait_for_holder(socket)
            qemu.kill()
            shown = waiting.communicate(timeout=_TIMEOUT_S)[0]
    assert json.loads(shown) == {"detached": uuid, "instance": "kept", "unplugged": False}
    assert _attachments(appliance, uuid) == []


def _wait_for_holder(monitor: Path) -> None:
    """Wait until somebody is connected to a monitor, which then does not greet others."""
    while True:
        with socket_module.socket(socket_module.AF_UNIX) as probe:
            probe.settimeout(1)
            probe.connect(str(monitor))
            try:
                probe.recv(1)
            except TimeoutError:
                return


def test_disk_that_a_machine_started_with_is_plugged(appliance: Appliance, tmp_path: Path) -> None:
    """A disk of QEMU's command line counts as plugged; where it cannot go, it stays attached."""
    uuid, other = _new_disk(appliance), _new_disk(appliance)
    place = ("--instance", "started", "--qmp", str(tmp_path / "qmp"))
    given = appliance.json("disk", "attach", uuid, "--instance", "started")["qemu_args"]
    with paused_qemu(tmp_path / "qmp", arguments=given):
        found = appliance.json("disk", "attach", uuid, *place)["plug"]
        assert found["already_plugged"] is True
        assert found["qdev_id"].startswith("/machine/")
        _refused(appliance, 4, "unplug-refused", "disk", "detach", uuid, *place)
        assert len(_attachments(appliance, uuid)) == 1

        ready = appliance.json("disk", "attach", other, *place, "--access", "ro")
        assert (ready["access"], ready["plug"]["bus"]) == ("ro", "virtio")
    for disk in (uuid, other):
        assert appliance.json("disk", "detach", disk, *place)["unplugged"] is False


def test_leftovers_of_a_killed_command_are_no_obstacle(
    appliance: Appliance, tmp_path: Path
) -> None:
    """Where a command died half-way, the next one plugs the disk; another takes it out whole."""
    uuid = _new_disk(appliance)
    socket, watch = tmp_path / "qmp", tmp_path / "watch"
    place = ("--instance", "left", "--qmp", str(socket))
    with paused_qemu(socket, watch):
        before = seen(watch)
        appliance.json("disk", "attach", uuid, "--instance", "left")
        handout = Handout.of(_attachments(appliance, uuid)[0])
        secret = {"qom-type": "secret", "id": handout.secret_id, "data": handout.secret}
        qmp(watch, "object-add", **secret)
        qmp(watch, "blockdev-add", **handout.blockdev)

        made = appliance.json("disk", "attach", uuid, *place, "--bus", "scsi")
        assert made["plug"]["already_plugged"] is False
        assert appliance.json("disk", "detach", uuid, *place)["unplugged"] is True
        assert seen(watch) == before | {"sc-scsi"}


@pytest.mark.parametrize("kind", ["qmp", "libvirt"])
def test_commands_at_once_do_not_disturb_each_other(
    appliance: Appliance, tmp_path: Path, kind: str
) -> None:
    """Disks that several commands plug at once are all there, each once, also one that two plug."""
    uuids = [_new_disk(appliance) for _ in range(3)]
    with ExitStack() as stack:
        if kind == "qmp":
            stack.enter_context(paused_qemu(tmp_path / "qmp"))
            place = ["--qmp", str(tmp_path / "qmp")]
        else:
            libvirt = stack.enter_context(PrivateLibvirt())
            libvirt.start("many", "", ports=1, paused=True)
            place = ["--domain", "many", "--libvirt", libvirt.uri]
        place += ["--instance", f"many-{kind}"]
        running = [
            stack.enter_context(subprocess.Popen(
                appliance.command("disk", "attach", uuid, *place, "--bus", "scsi", "--json"),
                stdout=subprocess.PIPE, text=True,
            ))
            for uuid in (*uuids, uuids[0])
        ]  # fmt: skip
        plugs = [json.loads(command.communicate(timeout=_TIMEOUT_S)[0])["plug"]
                 for command in running]  # fmt: skip
        assert {plug["serial"] for plug in plugs} == {_serial(uuid) for uuid in uuids}
        assert len({plug["qdev_id"] for plug in plugs}) == 3
        if kind == "libvirt":
            shown = libvirt.virsh("domblklist", "many").splitlines()
            assert [line.split()[0] for line in shown] == ["vda", "sda", "sdb", "sdc"]
        for uuid in uuids:
            assert appliance.json("disk", "detach", uuid, *place)["unplugged"] is True


def test_disks_come_and_go_in_a_libvirt_domain(appliance: Appliance) -> None:
    """A libvirt domain's guest sees a disk come and go as virtio and as SCSI; IDE is refused."""
    uuid, other = _new_disk(appliance), _new_disk(appliance)
    with PrivateLibvirt() as libvirt:
        place = ("--instance", "vm1", "--domain", "vm1", "--libvirt", libvirt.uri)
        libvirt.start("vm1", plug_script(2), ports=1)
        before = libvirt.virsh("dumpxml", "vm1")
        libvirt.wait_for("ready", _BOOT_TIMEOUT_S)
        _refused(appliance, 4, "bus-no-hotplug", "disk", "attach", uuid, *place, "--bus", "ide")
        assert _attachments(appliance, uuid) == []

        bound = (*place, "--initiator", "iqn.2026-11.org.example:host")
        made = appliance.json("disk", "attach", uuid, *bound)
        assert (made["plug"]["target_dev"], made["plug"]["bus"]) == ("vdb", "virtio")
        assert libvirt.wait_for("disk-1", _TIMEOUT_S) == f"vdb {_serial(uuid)}"
        assert f'serial="{_serial(uuid)}"' in _as_attributes(libvirt.virsh("dumpxml", "vm1"))
        secret = _attachments(appliance, uuid)[0]["chap"]["secret"]
        assert secret not in libvirt.virsh("dumpxml", "vm1", "--security-info")
        _secret_is_nowhere(secret, appliance.root, libvirt.folder)
        again = appliance.json("disk", "attach", uuid, *bound)
        assert again == {**made, "plug": {**made["plug"], "already_plugged": True}}
        _refused(appliance, 4, "no-hotplug-slot", "disk", "attach", other, *place)
        assert _attachments(appliance, other) == []
        assert len(libvirt.virsh("secret-list").split()) == 3

        assert appliance.json("disk", "detach", uuid, *place)["unplugged"] is True
        assert libvirt.wait_for("gone-1", _TIMEOUT_S) == "vdb"
        assert libvirt.virsh("secret-list").split() == []
        assert libvirt.virsh("dumpxml", "vm1") == before

        made = appliance.json("disk", "attach", uuid, *place, "--bus", "scsi")
        assert (made["plug"]["target_dev"], made["plug"]["bus"]) == ("sda", "scsi")
        assert libvirt.wait_for("disk-2", _TIMEOUT_S) == f"sda {_serial(uuid)}"
        assert libvirt.wait_for("read-2", _TIMEOUT_S) == pattern_digest(1)
        # the guest's script ends with its disk, and the machine with the script
        assert appliance.json("disk", "detach", uuid, *place)["unplugged"] is True
        libvirt.wait_for("exit", _TIMEOUT_S)
    assert _data(appliance, uuid).startswith(pattern(2))


def test_domain_that_ends_meanwhile_has_let_go(appliance: Appliance) -> None:
    """Where a domain's QEMU dies while it is asked for a disk, the disk is detached."""
    with PrivateLibvirt() as libvirt:
        for number in range(3):
            uuid, name = _new_disk(appliance), f"dies{number}"
            place = ("--instance", name, "--domain", name, "--libvirt", libvirt.uri)
            libvirt.start(name, "", ports=1, paused=True)
            appliance.json("disk", "attach", uuid, *place)
            command = appliance.command("disk", "detach", uuid, *place, "--json")
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            ) as detach:
                libvirt.kill_amid(name, "detach-device")
                output, errors = detach.communicate(timeout=_TIMEOUT_S)
            assert detach.returncode == 0, errors
            assert json.loads(output)["unplugged"] is True
            assert _attachments(appliance, uuid) == []
        assert libvirt.virsh("secret-list").split() == []


def _as_attributes(xml: str) -> str:
    return xml.replace("<serial>", 'serial="').replace("</serial>", '"')
