"""`/v1/disks/{uuid}/snapshots` and `/save`: what a disk was at one moment."""

import falcon

from stratocache.api import answers, query
from stratocache.api.listing import Listing
from stratocache.api.models import DiskSaving, SnapshotCreation, read_body
from stratocache.api.representations import SnapshotView
from stratocache.api.service import Service, require_success
from stratocache.fs import inventory, snapshot_intents
from stratocache.fs.records import Caller, SaveRequest
from stratocache.fs.state import Database

SNAPSHOTS = Listing(orders=("created_at", "tag", "size_bytes", "state"), filters=("tag", "state"))


class SnapshotCollection:
    """`/v1/disks/{uuid}/snapshots`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_get(self, request: falcon.Request, response: falcon.Response, uuid: str) -> None:
        """List a disk's snapshots."""
        db, page = self._service.db, SNAPSHOTS.page(request)
        inventory.disk(db, answers.caller(request), uuid)
        found = inventory.snapshot_page(db, uuid, page, **SNAPSHOTS.filters_of(request))
        chosen, after = SNAPSHOTS.cut(found, page)
        views = [SnapshotView.from_record(snapshot) for snapshot in chosen]
        answers.show_page(response, "snapshots", views, after)

    def on_post(self, request: falcon.Request, response: falcon.Response, uuid: str) -> None:
        """Take a snapshot: 201 once the disk's content is kept, 202 when that takes longer than
        `?wait=`. It can be cloned and rolled back to when its state is available."""
        query.require_known(request, "wait")
        wait_s = query.wait_seconds(request, default=60)
        wanted = read_body(request, SnapshotCreation)
        caller = answers.caller(request)
        operation = self._service.start(
            snapshot_intents.create_snapshot(self._service.db, caller, uuid, tag=wanted.tag),
            wait_s,
        )
        require_success(operation)
        if not operation.finished:
            answers.accept(response, operation)
            return
        snapshot = inventory.snapshot(self._service.db, caller, operation.subject)
        address = f"/v1/disks/{uuid}/snapshots/{snapshot.id}"
        answers.show(response, SnapshotView.from_record(snapshot), created_at=address)


class SnapshotItem:
    """`/v1/disks/{uuid}/snapshots/{snapshot_id}`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_get(
        self, request: falcon.Request, response: falcon.Response, uuid: str, snapshot_id: str
    ) -> None:
        """Show one snapshot."""
        query.require_known(request)
        caller = answers.caller(request)
        answers.show(response, _view(self._service.db, caller, uuid, snapshot_id))

    def on_delete(
        self, request: falcon.Request, response: falcon.Response, uuid: str, snapshot_id: str
    ) -> None:
        """Delete a snapshot: 204, or 202 when that takes longer than `?wait=`."""
        query.require_known(request, "wait")
        wait_s = query.wait_seconds(request, default=60)
        db, caller = self._service.db, answers.caller(request)
        with answers.matching(request, db, lambda: _view(db, caller, uuid, snapshot_id)):
            deletion = snapshot_intents.delete_snapshot(db, caller, uuid, snapshot_id)
        answers.finish_removal(response, self._service.start(deletion, wait_s))


class SnapshotRollback:
    """`/v1/disks/{uuid}/snapshots/{snapshot_id}/rollback`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_post(
        self, request: falcon.Request, response: falcon.Response, uuid: str, snapshot_id: str
    ) -> None:
        """Let the disk, which must not be attached, be again what it was: 204, or 202 when that
        takes longer than `?wait=`."""
        query.require_known(request, "wait")
        wait_s = query.wait_seconds(request, default=60)
        caller = answers.caller(request)
        operation = self._service.start(
            snapshot_intents.rollback(self._service.db, caller, uuid, snapshot_id), wait_s
        )
        answers.finish_removal(response, operation)


class DiskSave:
    """`/v1/disks/{uuid}/save`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_post(self, request: falcon.Request, response: falcon.Response, uuid: str) -> None:
        """Save a disk as an image: 202 and the operation, which `?wait=` waits for. Its result has
        the image's id and its unsigned metadata."""
        query.require_known(request, "wait")
        wait_s = query.wait_seconds(request, default=0)
        wanted = SaveRequest(**read_body(request, DiskSaving).model_dump())
        operation = self._service.start(
            snapshot_intents.save_disk(self._service.db, answers.caller(request), uuid, wanted),
            wait_s,
        )
        require_success(operation)
        answers.accept(response, operation)


def _view(db: Database, caller: Caller, uuid: str, snapshot_id: str) -> SnapshotView:
    return SnapshotView.from_record(inventory.snapshot(db, caller, snapshot_id, disk_uuid=uuid))
