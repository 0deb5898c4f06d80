"""The HTTP API as a WSGI application."""

import falcon

from stratocache.api.identity import caller_of
from stratocache.api.problem import add_handlers
from stratocache.api.request_counts import RequestCounts
from stratocache.api.resources.attachments import AttachmentCollection, AttachmentItem
from stratocache.api.resources.cache import CacheEviction, CachePlan, CacheScrub, CacheStatus
from stratocache.api.resources.content import DiskContent, DiskUpload
from stratocache.api.resources.disks import (
    DiskCollection,
    DiskHydration,
    DiskItem,
    DiskRestoration,
)
from stratocache.api.resources.health import Index, Liveness, MetricsPage, Readiness
from stratocache.api.resources.images import (
    ImageBootSet,
    ImageCollection,
    ImageItem,
    ImagePin,
    ImageVerification,
)
from stratocache.api.resources.launches import LaunchCollection, LaunchItem, LaunchLease
from stratocache.api.resources.operations import OperationCollection, OperationItem
from stratocache.api.resources.sharing import ChunkItem, ImageManifest
from stratocache.api.resources.snapshots import (
    DiskSave,
    SnapshotCollection,
    SnapshotItem,
    SnapshotRollback,
)
from stratocache.api.service import Service
from stratocache.cache.configuration import Configuration
from stratocache.fs.run_directory import RunDirectory
from stratocache.fs.shared_images import SharedImages
from stratocache.fs.state import Database

_OPEN_PATHS = ("/healthz", "/readyz")


class Authentication:
    """Finds out who sends a request, before any resource sees it."""

    def __init__(self, administrators: str) -> None:
        self._administrators = administrators

    def process_request(self, request: falcon.Request, response: falcon.Response) -> None:
        """Keep the caller in the request's context; health checks need none."""
        if request.path not in _OPEN_PATHS:
            request.context.caller = caller_of(request.env, self._administrators)


def create_app(
    configuration: Configuration, db: Database, requests: RequestCounts | None = None
) -> falcon.App[falcon.Request, falcon.Response]:
    """Return the application; `db` must have the present schema (`Database.migrate`).

    `requests` counts what comes.
    """
    service = Service(configuration, db)
    requests = requests or RequestCounts(RunDirectory(configuration.run_dir).counts)
    app = falcon.App()
    app.add_middleware(requests)
    app.add_middleware(Authentication(configuration.api.group))
    app.req_options.strip_url_path_trailing_slash = True
    add_handlers(app)
    attachments = "/v1/disks/{uuid}/attachments"
    snapshots = "/v1/disks/{uuid}/snapshots"
    app.add_route("/healthz", Liveness())
    app.add_route("/readyz", Readiness(service))
    app.add_route("/metrics", MetricsPage(service, requests))
    app.add_route("/v1", Index(service))
    app.add_route("/v1/images", ImageCollection(service))
    app.add_route("/v1/images/{image_id}", ImageItem(service))
    app.add_route("/v1/images/{image_id}/pin", ImagePin(service))
    app.add_route("/v1/images/{image_id}/bootset", ImageBootSet(service))
    app.add_route("/v1/images/{image_id}/verify", ImageVerification(service))
    shared = SharedImages(configuration, db)
    app.add_route("/v1/images/{image_id}/manifest", ImageManifest(shared))
    app.add_route("/v1/chunks/{digest}", ChunkItem(shared))
    app.add_route("/v1/disks", DiskCollection(service))
    app.add_route("/v1/disks/{uuid}", DiskItem(service))
    app.add_route("/v1/disks/{uuid}/content", DiskContent(service))
    app.add_route("/v1/disks/{uuid}/content/upload", DiskUpload(service))
    app.add_route("/v1/disks/{uuid}/hydrate", DiskHydration(service))
    app.add_route("/v1/disks/{uuid}/restore", DiskRestoration(service))
    app.add_route("/v1/disks/{uuid}/save", DiskSave(service))
    app.add_route(snapshots, SnapshotCollection(service))
    app.add_route(snapshots + "/{snapshot_id}", SnapshotItem(service))
    app.add_route(snapshots + "/{snapshot_id}/rollback", SnapshotRollback(service))
    app.add_route(attachments, AttachmentCollection(service))
    attachment = AttachmentItem(service)
    app.add_route(attachments + "/{attachment_id}", attachment)
    for suffix in ("migrate", "complete", "lease"):
        app.add_route(f"{attachments}/{{attachment_id}}/{suffix}", attachment, suffix=suffix)
    app.add_route("/v1/cache", CacheStatus(service))
    app.add_route("/v1/cache/plan", CachePlan(service))
    app.add_route("/v1/cache/evict", CacheEviction(service))
    app.add_route("/v1/cache/scrub", CacheScrub(service))
    app.add_route("/v1/launches", LaunchCollection(service))
    app.add_route("/v1/launches/{instance}", LaunchItem(service))
    app.add_route("/v1/launches/{instance}/lease", LaunchLease(service))
    app.add_route("/v1/operations", OperationCollection(service))
    app.add_route("/v1/operations/{operation_id}", OperationItem(service))
    return app
