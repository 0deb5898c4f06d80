"""What `disk attach --open-iscsi` and `disk detach --open-iscsi` do beside attaching."""

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from stratocache.api.attachment_commands import require_epoch
from stratocache.api.session import Session

if TYPE_CHECKING:
    from stratocache.api.client import Document


open_iscsi_option = click.option(
    "--open-iscsi", is_flag=True, help="Use the kernel initiator of this host."
)


def refuse_both(machine: object | None) -> None:
    """Refuse a machine beside this host."""
    if machine is not None:
        raise click.UsageError("Give --open-iscsi or a machine, not both.")


def attach_here(
    session: Session,
    disk_path: str,
    wanted: dict[str, Any],
    export: Callable[["Document"], "Document"],
) -> None:
    """Attach a disk, unless it is attached to that instance, log in, and write its device.

    The attachment is bound to this host's initiator. When the login fails, what was made is undone.
    """
    from stratocache.api import open_iscsi
    from stratocache.cache.errors import StratocacheError

    held = session.client.items(f"{disk_path}/attachments", "attachments")
    found = next((item for item in held if item["instance"] == wanted["instance"]), None)
    attachment = found or export(_bound(wanted, open_iscsi.initiator_name()))
    try:
        _require_reachable(session, attachment["portal"])
        chap = _chap(attachment)
        device = open_iscsi.Node.of(attachment).log_in(chap["username"], chap["secret"])
    except BaseException:
        if found is None:
            with suppress(StratocacheError):
                session.remove(f"{disk_path}/attachments/{attachment['id']}", "detach")
        raise
    session.show_fields(open_iscsi.shown(attachment, device))


def log_out_here(session: Session, disk_path: str, instance: str | None, epoch: int | None) -> bool:
    """Log out of a disk's attachment, if of that epoch; return whether there is one to be ended."""
    from stratocache.api import open_iscsi

    held = session.client.items(f"{disk_path}/attachments", "attachments")
    found = [item for item in held if instance in (None, item["instance"])]
    if len(found) == 1:  # what is ambiguous is refused by who asks
        require_epoch(found[0], epoch)
        open_iscsi.Node.of(found[0]).log_out()
    return bool(found)


def _bound(wanted: dict[str, Any], initiator: str | None) -> "Document":
    """Return a request that is bound to an initiator, if there is any."""
    chosen = wanted.get("initiator") or initiator
    return wanted if chosen is None else {**wanted, "initiator": chosen}


def _require_reachable(session: Session, portal: str) -> None:
    """Raise `Conflict` (`portal-local`) for another host's portal that only that host reaches."""
    import ipaddress

    from stratocache.cache.errors import Conflict

    if session.remote is None:
        return
    address, loopback = portal.rpartition(":")[0].strip("[]"), False
    with suppress(ValueError):  # a name
        loopback = ipaddress.ip_address(address).is_loopback
    if loopback:
        raise Conflict(
            "portal-local",
            f"The portal {portal} of {session.remote.shown} is for that host alone; set "
            "iscsi.address there to an address that this host reaches.",
        )


def _chap(attachment: "Document") -> dict[str, str]:
    from stratocache.cache.errors import Refused

    chap: dict[str, str] | None = attachment["chap"]
    if chap is None:
        raise Refused(
            "attachment-foreign", "Only the disk's owner or an administrator may log in to it."
        )
    return chap
