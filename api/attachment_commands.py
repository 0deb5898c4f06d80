"""`stratocache disk migrate` and `lease`: who may use a disk, for how long, and who is next."""

from typing import TYPE_CHECKING

import click

from stratocache.api.completion import DISK, HOLDER
from stratocache.api.examples import examples
from stratocache.api.resource_path import path_of
from stratocache.api.session import Session, json_option

if TYPE_CHECKING:
    from stratocache.api.client import Document

epoch_option = click.option(
    "--epoch", type=click.IntRange(min=0), help="Do nothing unless this is the present epoch."
)
lease_option = click.option(
    "--lease", "lease_s", type=int, metavar="SECONDS",
    help="Ends by itself when nobody renews it for so long.",
)  # fmt: skip


@click.command(
    epilog=examples(
        "stratocache disk migrate $UUID --to vm2",
        "stratocache disk migrate $UUID --complete      # or --abort",
    )
)
@click.argument("uuid", type=DISK)
@click.option("--to", metavar="INSTANCE", help="Attach it to this instance too, for a while.")
@click.option("--complete", is_flag=True, help="Take it from the first; the new one has it.")
@click.option("--abort", is_flag=True, help="Take it from the new one; the first keeps it.")
@click.option("--initiator", help="With --to: only this iSCSI initiator name may log in.")
@click.option(
    "--timeout", "timeout_s", type=int, default=600, show_default=True, metavar="SECONDS",
    help="With --to: abort what is not completed in this time.",
)  # fmt: skip
@json_option
@click.pass_obj
def migrate(
    session: Session,
    uuid: str,
    to: str | None,
    complete: bool,
    abort: bool,
    initiator: str | None,
    timeout_s: int,
) -> None:
    """Hand a disk over to another VM process while its guest goes on (live migration)."""
    if [to is not None, complete, abort].count(True) != 1:
        raise click.UsageError("Give one of --to, --complete and --abort.")
    held = _attachments(session, uuid)
    new = next((item for item in held if item["migrates"]), None)
    if to is not None:
        source = next((item for item in held if not item["migrates"]), None)
        if source is None:
            raise _unattached(uuid, None)
        body = {"instance": to, "timeout_s": timeout_s}
        if initiator is not None:
            body["initiator"] = initiator
        path = path_of("disks", uuid, "attachments", source["id"], "migrate")
        document = session.client.post(path, body, wait=0)
        if "target_iqn" not in document:
            done = session.follow(document, "migrate")
            document = session.client.get(path_of("disks", uuid, "attachments", done["subject"]))
        session.show_fields(document, hidden=("libvirt_xml", "qemu_args"))
        return
    if new is None:
        raise _not_migrating(uuid)
    if abort:
        session.remove(path_of("disks", uuid, "attachments", new["id"]), "abort", force="true")
        session.show({"aborted": uuid}, f"Disk {uuid} stays where it was.")
        return
    document = session.client.post(
        path_of("disks", uuid, "attachments", new["id"], "complete"), {}, wait=0
    )
    if "target_iqn" not in document:
        session.follow(document, "complete")
    session.show(
        {"migrated": uuid, "instance": new["instance"], "epoch": new["epoch"]},
        f"Disk {uuid} belongs to {new['instance']} now.",
    )


@click.command(
    epilog=examples(
        "stratocache disk lease $UUID --lease 3600",
    )
)
@click.argument("uuid", type=DISK)
@click.option("--instance", type=HOLDER, help="Needed when several instances have it.")
@lease_option
@epoch_option
@json_option
@click.pass_obj
def lease(
    session: Session, uuid: str, instance: str | None, lease_s: int | None, epoch: int | None
) -> None:
    """Renew the lease of an attachment, for as long as last time unless you say so."""
    attachment = find_attachment(session, uuid, instance)
    document = session.client.put(
        path_of("disks", uuid, "attachments", attachment["id"], "lease"),
        lease_body(lease_s),
        **epoch_parameter(epoch),
    )
    session.show(document, f"Disk {uuid} is leased until {document['lease_expires_at']}.")


def lease_body(lease_s: int | None) -> "Document":
    """Return what a renewal asks for."""
    return {} if lease_s is None else {"lease_s": lease_s}


def epoch_parameter(epoch: int | None) -> dict[str, str]:
    """Return the query of a request that is for one epoch only."""
    return {} if epoch is None else {"epoch": str(epoch)}


def require_epoch(attachment: "Document", epoch: int | None) -> None:
    """Raise `Conflict` (`epoch-stale`) before anything is done to another attachment."""
    from stratocache.cache.errors import Conflict

    if epoch is not None and epoch != attachment["epoch"]:
        raise Conflict(
            "epoch-stale",
            f"Attachment {attachment['id']} is of epoch {attachment['epoch']}, you mean epoch "
            f"{epoch}: nothing was changed.",
            field="epoch",
        )


def find_attachment(session: Session, uuid: str, instance: str | None) -> "Document":
    """Return the attachment of a disk to an instance, the only one when none is named.

    Raises `NotFound` (`attachment-unknown`), `InvalidInput` (`attachment-ambiguous`).
    """
    from stratocache.cache.errors import InvalidInput

    found = [item for item in _attachments(session, uuid) if instance in (None, item["instance"])]
    if not found:
        raise _unattached(uuid, instance)
    if len(found) > 1:
        raise InvalidInput(
            "attachment-ambiguous",
            f"Disk {uuid} is attached {len(found)} times; say which with --instance, or complete "
            "or abort its migration.",
            field="instance",
        )
    return found[0]


def _attachments(session: Session, uuid: str) -> "list[Document]":
    return session.client.items(path_of("disks", uuid, "attachments"), "attachments")


def _unattached(uuid: str, instance: str | None) -> Exception:
    from stratocache.cache.errors import NotFound

    where = "to anything" if instance is None else f"to {instance}"
    return NotFound("attachment-unknown", f"Disk {uuid} is not attached {where}.")


def _not_migrating(uuid: str) -> Exception:
    from stratocache.cache.errors import NotFound

    return NotFound(
        "migration-unknown", f"Disk {uuid} is not being migrated; begin with --to INSTANCE."
    )
