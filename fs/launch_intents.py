"""What users ask of instances: to be launched, and to be taken down; see
`stratocache.fs.operation_intents`."""

import json
import sqlite3
from dataclasses import asdict

from stratocache.cache.errors import Conflict, NotFound, Refused
from stratocache.fs import (
    attachment_intents,
    disk_conditions,
    inventory,
    operation_intents,
    quotas,
    records,
    rights,
)
from stratocache.fs.quotas import Amounts
from stratocache.fs.records import Caller, Launch, LaunchRequest, Operation
from stratocache.fs.state import Database, now


def request_launch(db: Database, caller: Caller, request: LaunchRequest) -> Operation:
    """Ask for everything that booting an instance needs; repeated, it answers with the first.

    Raises `Conflict` (`instance-exists`) when the instance was launched with another request.
    """
    wanted = asdict(request)
    with db.transaction() as connection:
        row = db.row("SELECT * FROM launches WHERE instance = ?", request.instance)
        if row is not None:
            launch = records.launch_from(row)
            if launch.state == "ending":
                raise Conflict(
                    "instance-busy",
                    f"Instance {request.instance} is being taken down; try again in a moment.",
                )
            # requests of older versions lack what they did not know
            if {"lease_s": None, **launch.request} == json.loads(json.dumps(wanted)):
                return inventory.operation(db, launch.operation_id)
            raise Conflict(
                "instance-exists",
                f"Instance {request.instance} was launched with another request; halt it first.",
            )
        for uuid in request.disks:
            disk_conditions.check_attachable(db, caller, inventory.disk(db, caller, uuid), "rw")
        held = Amounts(
            bytes=request.size_bytes or 0,
            disks=1,
            attachments=1 + len(request.disks) + len(request.readonly),
        )
        quotas.require(connection, caller.name, held)
        operation = operation_intents.add_operation(
            connection, caller, "launch", request.instance, wanted
        )
        connection.execute(
            "INSERT INTO launches (instance, operation_id, request, state, lease_s, created_at) "
            "VALUES (?, ?, ?, 'preparing', ?, ?)",
            (request.instance, operation.id, json.dumps(wanted), request.lease_s, now()),
        )
        return operation


def halt(
    db: Database,
    caller: Caller,
    instance: str,
    *,
    failed: bool = False,
    epoch: int | None = None,
) -> Operation:
    """Ask for an instance's attachments to end, and its volatile disks to be deleted.

    Those of an instance that has `failed` go to quarantine instead. Raises `Conflict`
    (`epoch-stale`) when the instance has been launched anew since.
    """
    with db.transaction() as connection:
        launch = own_launch(db, caller, instance, epoch=epoch, ending=True)
        if launch.state == "preparing":
            raise Conflict(
                "instance-busy",
                f"Instance {instance} is being launched; cancel operation {launch.operation_id}.",
            )
        if launch.state == "ending":
            under_way = inventory.open_operations(db, instance, "halt")
            if under_way:
                return under_way[0]
        end_launch(connection, db, instance, failed=failed)
        return operation_intents.add_operation(
            connection, caller, "halt", instance, {"failed": failed}
        )


def own_launch(
    db: Database,
    caller: Caller,
    instance: str,
    *,
    epoch: int | None = None,
    ending: bool = False,
) -> Launch:
    """Return a launch that the caller may change, or end: operators may end everybody's.

    Raises `NotFound`, `Refused` (`launch-not-yours`) and `Conflict` (`epoch-stale`).
    """
    launch = inventory.launch(db, instance)
    owner = inventory.operation(db, launch.operation_id).owner
    if not rights.may_change(caller, owner, ending=ending):
        if not caller.operator:
            raise NotFound("instance-unknown", f"No instance {instance} was launched here.")
        raise Refused("launch-not-yours", f"Instance {instance} was launched by {owner}.")
    attachment_intents.require_epoch(epoch, launch.epoch, f"Instance {instance}")
    return launch


def end_launch(
    connection: sqlite3.Connection,
    db: Database,
    instance: str,
    *,
    failed: bool = False,
    fencing: bool = False,
) -> None:
    """Mark all of a launch for removal, within the caller's transaction."""
    connection.execute("UPDATE launches SET state = 'ending' WHERE instance = ?", (instance,))
    for attachment in inventory.attachments(db, instance=instance):
        if failed:
            attachment_intents.quarantine(connection, attachment)
        attachment_intents.remove_attachment(connection, attachment, fencing=fencing)
