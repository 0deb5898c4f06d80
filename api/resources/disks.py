"""`/v1/disks`: block devices that somebody owns."""

import falcon

from stratocache.api import answers, query
from stratocache.api.listing import Listing
from stratocache.api.models import DiskChange, DiskCreation, read_body
from stratocache.api.representations import DiskDetails, DiskView
from stratocache.api.service import Service, require_success
from stratocache.cache.errors import InvalidInput
from stratocache.fs import disk_intents, fetch_account, inventory, space_plan
from stratocache.fs.import_intents import ImportRequest, import_disk
from stratocache.fs.records import Caller, Disk, DiskRequest, Operation
from stratocache.fs.state import Database

DISKS = Listing(
    orders=("created_at", "tag", "size_bytes", "owner", "state"),
    filters=("state", "tag", "owner", "visibility", "kind", "base_image"),
)


class DiskCollection:
    """`/v1/disks`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        """List the disks that the caller may see."""
        db, page = self._service.db, DISKS.page(request)
        wanted = DISKS.filters_of(request)
        found = inventory.disks(db, answers.caller(request), page=page, **wanted)
        chosen, after = DISKS.cut(found, page)
        held = inventory.attachments_of(db, chosen)
        views = [DiskView.of(disk, held[disk.uuid]) for disk in chosen]
        answers.show_page(response, "disks", views, after)

    def on_post(self, request: falcon.Request, response: falcon.Response) -> None:
        """Create a disk: 201, or 202 and an operation when that takes longer than `?wait=`."""
        query.require_known(request, "wait")
        wait_s = query.wait_seconds(request, default=60)
        wanted = read_body(request, DiskCreation)
        caller = answers.caller(request)
        disk_request = DiskRequest(
            size_bytes=wanted.size_bytes,
            reference=wanted.reference,
            snapshot=wanted.snapshot,
            tag=wanted.tag,
            visibility=wanted.visibility,
            kind=wanted.kind,
            volatile=wanted.volatile,
        )
        operation = self._service.start(
            _create(self._service.db, caller, disk_request, wanted), wait_s
        )
        require_success(operation)
        if not operation.finished:
            answers.accept(response, operation)
            return
        view = _view(self._service, caller, operation.subject)
        answers.show(response, view, created_at=f"/v1/disks/{view.uuid}")


class DiskItem:
    """`/v1/disks/{uuid}`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_get(self, request: falcon.Request, response: falcon.Response, uuid: str) -> None:
        """Show one disk, and what fetching cost it."""
        query.require_known(request)
        answers.show(response, _view(self._service, answers.caller(request), uuid))

    def on_patch(self, request: falcon.Request, response: falcon.Response, uuid: str) -> None:
        """Change tag, visibility or owner, and grow: 202 when that takes longer than `?wait=`."""
        query.require_known(request, "wait")
        wait_s = query.wait_seconds(request, default=60)
        wanted = read_body(request, DiskChange)
        caller = answers.caller(request)
        db = self._service.db
        view = _view(self._service, caller, uuid)
        growth = None
        with answers.matching(request, db, lambda: _view(self._service, caller, uuid)):
            if wanted.size_bytes not in (None, view.size_bytes):
                assert wanted.size_bytes is not None
                space_plan.admit(self._service.configuration, db, uuid, wanted.size_bytes)
                growth = disk_intents.resize_disk(db, caller, uuid, wanted.size_bytes)
            disk_intents.update_disk(
                db, caller, uuid,
                tag=wanted.tag, visibility=wanted.visibility, owner=wanted.owner,
            )  # fmt: skip
        if growth is not None:
            growth = self._service.start(growth, wait_s)
            require_success(growth)
            if not growth.finished:
                answers.accept(response, growth)
                return
        # as it is now, also for whom it has just been given away by
        answers.show(response, _view(self._service, Caller(caller.name, "admin"), uuid))

    def on_delete(self, request: falcon.Request, response: falcon.Response, uuid: str) -> None:
        """Delete a disk that is not attached: 204, or 202 when that takes longer than `?wait=`.

        `?snapshots=delete` deletes its snapshots with it.
        """
        query.require_known(request, "wait", "snapshots")
        with_snapshots = query.choice(request, "snapshots", "delete") == "delete"
        wait_s = query.wait_seconds(request, default=60)
        caller = answers.caller(request)
        db = self._service.db
        with answers.matching(request, db, lambda: _view(self._service, caller, uuid)):
            deletion = disk_intents.delete_disk(db, caller, uuid, with_snapshots=with_snapshots)
        operation = self._service.start(deletion, wait_s)
        answers.finish_removal(response, operation)


class DiskHydration:
    """`/v1/disks/{uuid}/hydrate`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_post(self, request: falcon.Request, response: falcon.Response, uuid: str) -> None:
        """Let an overlay become complete: 202 and the operation, which `?wait=` waits for."""
        query.require_known(request, "wait")
        wait_s = query.wait_seconds(request, default=0)
        operation = self._service.start(
            disk_intents.hydrate_disk(self._service.db, answers.caller(request), uuid), wait_s
        )
        require_success(operation)
        answers.accept(response, operation)


class DiskRestoration:
    """`/v1/disks/{uuid}/restore`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_post(self, request: falcon.Request, response: falcon.Response, uuid: str) -> None:
        """Take a disk out of quarantine for good: 200 and the disk."""
        query.require_known(request)
        disk = disk_intents.restore_disk(self._service.db, answers.caller(request), uuid)
        answers.show(response, disk_details(self._service.db, disk))


def _create(db: Database, caller: Caller, disk: DiskRequest, wanted: DiskCreation) -> Operation:
    facts = {name: getattr(wanted, name) for name in ("format", "compression", "sha256", "sha512")}
    if wanted.import_url is not None:
        wanted_file = ImportRequest(wanted.import_url, size_bytes=wanted.size_bytes, **facts)
        return import_disk(db, caller, disk, wanted_file)
    for name, value in facts.items():
        if value is not None:
            raise InvalidInput("field-unknown", f"{name} goes with import_url only.", field=name)
    return disk_intents.create_disk(db, caller, disk)


def _view(service: Service, caller: Caller, uuid: str) -> DiskDetails:
    return disk_details(service.db, inventory.disk(service.db, caller, uuid))


def disk_details(db: Database, disk: Disk) -> DiskDetails:
    """Return a disk, and what fetching cost it."""
    attachments = inventory.attachments(db, disk_uuid=disk.uuid)
    account = fetch_account.of_disk(db, disk)
    return DiskDetails.with_account(
        disk, attachments, account, fenced=inventory.is_fenced(db, disk)
    )
