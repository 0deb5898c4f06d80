"""`stratocache disk`: block devices that somebody owns."""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stratocache.api import hot_plug
from stratocache.api.attachment_commands import (
    epoch_option,
    epoch_parameter,
    find_attachment,
    lease,
    lease_option,
    migrate,
    require_epoch,
)
from stratocache.api.cache_commands import promise_line
from stratocache.api.check_commands import check
from stratocache.api.completion import DISK, HOLDER, IMAGE, SNAPSHOT
from stratocache.api.content_commands import download, import_options, upload
from stratocache.api.examples import examples
from stratocache.api.hot_plug import machine_options, place_of
from stratocache.api.open_iscsi_commands import (
    attach_here,
    log_out_here,
    open_iscsi_option,
    refuse_both,
)
from stratocache.api.resource_path import path_of
from stratocache.api.session import Session, SizeType, json_option
from stratocache.api.share_commands import share, shares, unshare
from stratocache.api.sizes import format_size
from stratocache.api.snapshot_commands import (
    hydrate,
    resize,
    restore,
    rollback,
    save,
    snapshot,
    snapshot_rm,
    snapshots,
)
from stratocache.api.watch import watch_option

if TYPE_CHECKING:
    from stratocache.api.client import Document
    from stratocache.api.guest_disk import Bus

_VISIBILITY = click.Choice(["private", "public"])


@click.group()
def disk() -> None:
    """Create, list, change, attach and delete disks."""


disk.add_command(check)
disk.add_command(download)
disk.add_command(lease)
disk.add_command(migrate)
disk.add_command(upload)
for command in (share, shares, unshare):
    disk.add_command(command)
for command in (hydrate, resize, restore, rollback, save, snapshot, snapshot_rm, snapshots):
    disk.add_command(command)


@disk.command(
    epilog=examples(
        "stratocache disk create --size 20G --tag results",
        "stratocache disk create --reference MMZu9WvwKIro-rtBQfDk4PsKO7_ --size 40G",
        "stratocache disk create --import https://example.org/disk.qcow2",
    )
)
@click.option("--size", "size_bytes", type=SizeType(), help="Such as 10G; blank disks need one.")
@click.option("--reference", type=IMAGE, help="Clone this image; --size may grow the clone.")
@click.option(
    "--snapshot",
    type=SNAPSHOT,
    metavar="ID",
    help="Clone this snapshot; --size may grow the clone.",
)
@click.option("--tag", default="", help="Free text, at most 40 characters.")
@click.option(
    "--visibility", type=_VISIBILITY, default="private", show_default=True,
    help="A public one may be seen, cloned and attached read-only by everybody.",
)  # fmt: skip
@click.option(
    "--kind",
    type=click.Choice(["machine", "data", "readonly"]),
    default="data",
    show_default=True,
    help="What it is for.",
)
@click.option("--volatile", is_flag=True, help="Delete it when it is detached.")
@import_options
@json_option
@click.pass_obj
def create(session: Session, /, **wanted: Any) -> None:
    """Create a disk and write its UUID."""
    body = {name: value for name, value in wanted.items() if value is not None}
    operation = session.client.begin("/v1/disks", body)
    uuid = operation.get("uuid")
    if uuid is None:
        uuid = session.follow(operation, "create")["subject"]
    session.show(session.client.get(path_of("disks", uuid)), uuid)
    if not session.as_json:
        from stratocache.cache.errors import Refused

        with suppress(Refused):  # not everybody may see it
            click.echo(promise_line(session.client.get("/v1/cache")), err=True)


@disk.command(
    epilog=examples(
        "stratocache disk ls --tag results",
        "stratocache disk ls --watch",
        "stratocache disk ls --json | jq -r '.disks[].uuid'",
    )
)
@click.option("--tag", help="Only disks with this tag.")
@click.option("--owner", help="Only disks of this user.")
@watch_option
@json_option
@click.pass_obj
def ls(session: Session, tag: str | None, owner: str | None) -> None:
    """List the disks that you may see."""
    session.show_list(
        "/v1/disks",
        {
            "UUID": "uuid",
            "STATE": lambda item: "problem" if item["problems"] else item["state"],
            "SIZE": lambda item: format_size(item["size_bytes"]),
            "FORM": "form",
            "OWNER": "owner",
            "TAG": "tag",
            "ATTACHED": lambda item: ",".join(item["attached_to"]) or None,
        },
        tag=tag,
        owner=owner,
    )


@disk.command(
    epilog=examples(
        "stratocache disk show $UUID",
    )
)
@click.argument("uuid", type=DISK)
@watch_option
@json_option
@click.pass_obj
def show(session: Session, uuid: str) -> None:
    """Show one disk, and what its guest waited for remote bytes."""
    from stratocache.api import plots

    document = session.client.get(path_of("disks", uuid))
    session.show_fields(document, hidden=("traffic_history",))
    if not session.as_json:
        plots.echo_history(document)


@disk.command(
    epilog=examples(
        "stratocache disk rm $UUID",
        "stratocache disk rm $UUID --snapshots",
    )
)
@click.argument("uuid", type=DISK)
@click.option("--snapshots", is_flag=True, help="Delete its snapshots too.")
@json_option
@click.pass_obj
def rm(session: Session, uuid: str, snapshots: bool) -> None:
    """Delete a disk that is not attached, for good."""
    session.remove(
        path_of("disks", uuid), "delete", **({"snapshots": "delete"} if snapshots else {})
    )
    session.show({"deleted": uuid}, f"Disk {uuid} is deleted.")


@disk.command(
    name="set",
    epilog=examples(
        "stratocache disk set $UUID --tag 'results of May' --visibility public",
    ),
)
@click.argument("uuid", type=DISK)
@click.option("--tag", help="Free text, at most 40 characters.")
@click.option("--visibility", type=_VISIBILITY, help="Who may see and clone it.")
@click.option("--owner", help="Give the disk to this user (administrators only).")
@json_option
@click.pass_obj
def change(session: Session, /, uuid: str, **wanted: str | None) -> None:
    """Change what is written about a disk."""
    body = {name: value for name, value in wanted.items() if value is not None}
    if not body:
        raise click.UsageError("Give --tag, --visibility or --owner.")
    session.show(session.client.patch(path_of("disks", uuid), body), f"Disk {uuid} is changed.")


@disk.command(
    epilog=examples(
        "stratocache disk attach $UUID --instance vm1",
        "stratocache disk attach $UUID --instance vm1 --qmp /run/vm1.qmp",
        "stratocache disk attach $UUID --instance here --open-iscsi",
    )
)
@click.argument("uuid", type=DISK)
@click.option("--instance", required=True, help="Id of the VM that will use it.")
@click.option(
    "--access", type=click.Choice(["rw", "ro"]), default="rw", show_default=True,
    help="Whether the instance may write.",
)  # fmt: skip
@click.option("--initiator", help="Only this iSCSI initiator name may log in.")
@lease_option
@machine_options
@open_iscsi_option
@click.option(
    "--bus", type=click.Choice(["virtio", "scsi", "ide"]),
    help="With --qmp or --domain: what the guest sees [default: virtio].",
)  # fmt: skip
@json_option
@click.pass_obj
def attach(
    session: Session,
    /,
    uuid: str,
    qmp: Path | None,
    domain: str | None,
    libvirt: str | None,
    timeout_s: int | None,
    bus: "Bus | None",
    open_iscsi: bool,
    **wanted: Any,
) -> None:
    """Export a disk over iSCSI to an instance and write how to reach it.

    With --qmp or --domain the disk appears in that running machine, and what its guest calls it is
    written; with --open-iscsi this host logs in, and its device is written. When that fails, the
    disk is not attached either.
    """
    body = {name: value for name, value in wanted.items() if value is not None}
    place = place_of(qmp, domain, libvirt, timeout_s, bus)
    if open_iscsi:
        refuse_both(place)
        attach_here(
            session, path_of("disks", uuid), body, lambda body: _export(session, uuid, body)
        )
        return
    if place is not None:
        hot_plug.attach(session, uuid, place, lambda: _export(session, uuid, body))
        return
    session.show_fields(_export(session, uuid, body), hidden=("libvirt_xml", "qemu_args"))


def _export(session: Session, uuid: str, body: "Document") -> "Document":
    document = session.client.post(path_of("disks", uuid, "attachments"), body, wait=0)
    if "target_iqn" not in document:
        done = session.follow(document, "attach")
        document = session.client.get(path_of("disks", uuid, "attachments", done["subject"]))
    return document


@disk.command(
    epilog=examples(
        "stratocache disk detach $UUID",
        "stratocache disk detach $UUID --instance vm1 --force",
    )
)
@click.argument("uuid", type=DISK)
@click.option("--instance", type=HOLDER, help="Needed when several instances have it.")
@click.option("--force", is_flag=True, help="Cut it off, proven: nobody can use it after that.")
@epoch_option
@machine_options
@open_iscsi_option
@json_option
@click.pass_obj
def detach(
    session: Session,
    uuid: str,
    instance: str | None,
    force: bool,
    epoch: int | None,
    qmp: Path | None,
    domain: str | None,
    libvirt: str | None,
    timeout_s: int | None,
    open_iscsi: bool,
) -> None:
    """End the export of a disk to an instance; who is logged in is logged out.

    With --qmp or --domain the disk is unplugged from that running machine first; when its guest
    does not let it go, it stays attached. A machine that has ended is fine, a SOCKET that is not
    there is not: leave --qmp out then. With --open-iscsi this host logs out first, unless it uses
    the device.
    """
    place = place_of(qmp, domain, libvirt, timeout_s)
    if open_iscsi:
        refuse_both(place)
        if not log_out_here(session, path_of("disks", uuid), instance, epoch):
            session.show({"detached": uuid}, f"Disk {uuid} is not attached.")
            return
    attachment = find_attachment(session, uuid, instance)
    require_epoch(attachment, epoch)
    shown = {"detached": uuid, "instance": attachment["instance"]}
    if place is not None:
        shown["unplugged"] = hot_plug.unplug(attachment, place)
    parameters = {**epoch_parameter(epoch), **({"force": "true"} if force else {})}
    session.remove(path_of("disks", uuid, "attachments", attachment["id"]), "detach", **parameters)
    session.show(shown, f"Disk {uuid} is detached from {attachment['instance']}.")
