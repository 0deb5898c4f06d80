"""`stratocache launch` and `halt`: a reference becomes the disks of a VM."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stratocache.api.attachment_commands import (
    epoch_option,
    epoch_parameter,
    lease_body,
    lease_option,
)
from stratocache.api.completion import DISK, IMAGE, INSTANCE
from stratocache.api.examples import examples
from stratocache.api.resource_path import path_of
from stratocache.api.session import Session, SizeType, json_option

if TYPE_CHECKING:
    from stratocache.api.client import Document

_QEMU = "qemu-system-x86_64"
_KVM = Path("/dev/kvm")
_PORTS = 8


@click.command(
    epilog=examples(
        "stratocache launch MMZu9WvwKIro-rtBQfDk4PsKO7_ --instance vm1 --disk $UUID --print qemu",
        "stratocache launch MMZu9WvwKIro-rtBQfDk4PsKO7_ --instance vm1 --print xml",
        "stratocache launch MMZu9WvwKIro-rtBQfDk4PsKO7_ --instance vm1 --run qemu",
    )
)
@click.argument("reference", type=IMAGE)
@click.option("--instance", required=True, help="Id of the VM.")
@click.option("--size", "size_bytes", type=SizeType(), help="Grow the boot disk, such as 20G.")
@click.option(
    "--disk", "disks", type=DISK, multiple=True, metavar="UUID", help="Attach this disk too."
)
@click.option(
    "--readonly-disk", "readonly", type=IMAGE, multiple=True, metavar="REFERENCE",
    help="Attach this image too, read-only.",
)  # fmt: skip
@click.option("--initiator", help="Only this iSCSI initiator name may log in.")
@click.option(
    "--provisional", is_flag=True,
    help="Take an image that no index proves before it is verified, if its endorser may be trusted.",
)  # fmt: skip
@lease_option
@click.option(
    "--print", "format_", type=click.Choice(["json", "xml", "qemu"]),
    help="Write JSON, libvirt <disk> elements, or QEMU arguments.",
)  # fmt: skip
@click.option(
    "--run", "runner", type=click.Choice(["qemu", "libvirt"]),
    help="Run the VM here, its serial console on this terminal; halt it when it ends.",
)  # fmt: skip
@click.option("--memory", type=SizeType(), default="1G", show_default=True, help="With --run.")
@click.option("--accel", type=click.Choice(["kvm", "tcg"]), help="With --run; KVM where it works.")
@click.option(
    "--qmp", type=click.Path(path_type=Path), metavar="SOCKET",
    help="With --run: the VM's monitor, for `disk attach --qmp`.",
)  # fmt: skip
@json_option
@click.pass_obj
def launch(
    session: Session,
    /,
    format_: str | None,
    runner: str | None,
    memory: int,
    accel: str | None,
    qmp: Path | None,
    **wanted: Any,
) -> None:
    """Clone REFERENCE for a new VM and write how to reach its disks; Ctrl-C undoes it."""
    _require_runner(runner)
    if qmp is not None and runner != "qemu":
        raise click.UsageError("--qmp goes with --run qemu.")
    session.as_json = session.as_json or format_ == "json"
    body = {name: value for name, value in wanted.items() if value is not None}
    document = session.client.begin("/v1/launches", body)
    if "attachments" not in document:
        session.follow(document, "launch")
        document = session.client.get(path_of("launches", wanted["instance"]))
    if runner == "qemu":
        _run(session, document, qemu_command(document["qemu_args"], memory, accel, qmp))
    elif session.as_json:
        session.show(document, "")
    elif format_ == "xml":
        click.echo(document["libvirt_xml"])
    elif format_ == "qemu":
        click.echo(shlex.join(document["qemu_args"]))
    else:
        _summarise(session, document)


def _require_runner(runner: str | None) -> None:
    from stratocache.cache.errors import InvalidInput

    if runner == "libvirt":
        raise InvalidInput(
            "runner-unsupported",
            "Running through libvirt is not supported yet; use --print xml in a domain's XML.",
            field="run",
        )
    if runner == "qemu" and shutil.which(_QEMU) is None:
        raise InvalidInput(
            "runner-missing", f"{_QEMU} is not installed (package qemu-system-x86).", field="run"
        )


def _summarise(session: Session, document: "Document") -> None:
    session.show_table(
        "attachments",
        document["attachments"],
        {
            "ROLE": "role",
            "ACCESS": "access",
            "DISK OR IMAGE": lambda item: item["disk_uuid"] or item["image_id"],
            "URL": "iscsi_url",
        },
    )


def _run(session: Session, document: "Document", command: Sequence[str]) -> None:
    """Run QEMU in the foreground, then halt the instance; raises `Internal` when QEMU failed."""
    from stratocache.cache.errors import Internal

    try:
        status = subprocess.run(command, check=False).returncode
    finally:
        session.remove(path_of("launches", document["instance"]), "halt")
    if status != 0:
        raise Internal("qemu-failed", f"{_QEMU} ended with status {status}.")


def qemu_command(
    arguments: Sequence[str], memory_bytes: int, accel: str | None, qmp: Path | None = None
) -> list[str]:
    """Return a whole QEMU command: these disks, one user-mode network card, serial on stdio.

    With a monitor's socket it has ports for disks that are plugged later.
    """
    if accel is None:
        accel = "kvm" if os.access(_KVM, os.R_OK | os.W_OK) else "tcg"
    return [
        _QEMU, "-accel", accel, "-machine", "q35", "-cpu", "max",
        "-m", f"{memory_bytes // 1024**2}M", "-nodefaults", "-no-user-config", "-display", "none",
        "-serial", "mon:stdio", "-nic", "user,model=virtio-net-pci", *arguments,
        *([] if qmp is None else _pluggable(qmp)),
    ]  # fmt: skip


def _pluggable(qmp: Path) -> list[str]:
    socket = str(qmp).replace(",", ",,")
    ports = (f"pcie-root-port,id=plug{number},chassis={number}" for number in range(1, _PORTS + 1))
    return [
        "-qmp", f"unix:{socket},server=on,wait=off",
        *(argument for port in ports for argument in ("-device", port)),
    ]  # fmt: skip


@click.command(
    epilog=examples(
        "stratocache halt vm1",
        "stratocache halt vm1 --failed",
    )
)
@click.argument("instance", type=INSTANCE)
@click.option("--failed", is_flag=True, help="Keep its volatile disks for a while (quarantine).")
@epoch_option
@json_option
@click.pass_obj
def halt(session: Session, instance: str, failed: bool, epoch: int | None) -> None:
    """Detach all disks of an instance and delete its volatile ones."""
    parameters = {**epoch_parameter(epoch), **({"outcome": "failed"} if failed else {})}
    session.remove(path_of("launches", instance), "halt", **parameters)
    session.show({"halted": instance}, f"Instance {instance} is halted.")


@click.command(
    epilog=examples(
        "stratocache lease vm1 --lease 3600",
    )
)
@click.argument("instance", type=INSTANCE)
@lease_option
@epoch_option
@json_option
@click.pass_obj
def lease(session: Session, instance: str, lease_s: int | None, epoch: int | None) -> None:
    """Renew the lease of an instance, for as long as last time unless you say so."""
    document = session.client.put(
        path_of("launches", instance, "lease"), lease_body(lease_s), **epoch_parameter(epoch)
    )
    session.show(document, f"Instance {instance} is leased until {document['lease_expires_at']}.")
