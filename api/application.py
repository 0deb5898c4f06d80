"""The HTTP API as a WSGI application."""

from collections.abc import Callable

from stratocache.api.audit import AuditMiddleware
from stratocache.api.authentication import Authentication
from stratocache.api.authorisation import Authorisation, require_rules
from stratocache.api.conditional import Conditional
from stratocache.api.head_requests import App, HeadRequests
from stratocache.api.idempotency import Idempotency
from stratocache.api.login import Login
from stratocache.api.openapi import OpenApi
from stratocache.api.pages.errors import ErrorPages
from stratocache.api.pages.routes import add_pages
from stratocache.api.problem import add_handlers
from stratocache.api.rate_limit import RateLimit
from stratocache.api.request_counts import RequestCounts
from stratocache.api.request_log import RequestLog
from stratocache.api.resources.accounts import (
    AccountCollection,
    AccountItem,
    TokenCollection,
    TokenItem,
)
from stratocache.api.resources.attachments import (
    AttachmentCollection,
    AttachmentItem,
    AttachmentOverview,
)
from stratocache.api.resources.audit import AuditLog, AuditPrune
from stratocache.api.resources.cache import CacheEviction, CachePlan, CacheScrub, CacheStatus
from stratocache.api.resources.content import DiskContent, DiskUpload
from stratocache.api.resources.disks import (
    DiskCollection,
    DiskHydration,
    DiskItem,
    DiskRestoration,
)
from stratocache.api.resources.events import EventCollection
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
from stratocache.api.resources.overview import Overview
from stratocache.api.resources.references import ReferenceCollection
from stratocache.api.resources.sessions import SessionItem
from stratocache.api.resources.shares import ShareCollection, ShareItem
from stratocache.api.resources.sharing import ChunkItem, ImageManifest
from stratocache.api.resources.snapshots import (
    DiskSave,
    SnapshotCollection,
    SnapshotItem,
    SnapshotRollback,
)
from stratocache.api.security_headers import SecurityHeaders
from stratocache.api.service import Service
from stratocache.cache.configuration import Configuration
from stratocache.fs.run_directory import RunDirectory
from stratocache.fs.shared_images import SharedImages
from stratocache.fs.state import Database


def create_app(
    configuration: Configuration,
    db: Database,
    requests: RequestCounts | None = None,
    *,
    is_ending: Callable[[], bool] = lambda: False,
) -> App:
    """Return the application; `db` must have the present schema (`Database.migrate`).

    `requests` counts what comes; `is_ending` tells what never ends by itself that it should.
    """
    service = Service(configuration, db, is_ending)
    requests = requests or RequestCounts(RunDirectory(configuration.run_dir).counts)
    app = App()
    app.add_middleware(SecurityHeaders())
    app.add_middleware(RequestLog())
    app.add_middleware(requests)
    app.add_middleware(AuditMiddleware(configuration.api, db))
    app.add_middleware(RateLimit(configuration.api))
    app.add_middleware(Authentication(configuration.api, db))
    app.add_middleware(Authorisation(db))
    app.add_middleware(HeadRequests())
    app.add_middleware(Conditional())
    app.add_middleware(Idempotency(app, db))
    app.req_options.strip_url_path_trailing_slash = True
    add_handlers(app)
    _add_service(app, service, requests)
    _add_images(app, service)
    _add_disks(app, service)
    _add_attachments(app, service)
    _add_accounts(app, service)
    app.add_middleware(ErrorPages(add_pages(app, service)))
    require_rules(app)
    return app


def _add_service(app: App, service: Service, requests: RequestCounts) -> None:
    app.add_route("/healthz", Liveness())
    app.add_route("/readyz", Readiness(service))
    app.add_route("/metrics", MetricsPage(service, requests))
    app.add_route("/openapi.json", OpenApi())
    app.add_route("/v1", Index(service))
    app.add_route("/v1/overview", Overview(service))
    app.add_route("/v1/events", EventCollection(service))
    app.add_route("/v1/operations", OperationCollection(service))
    app.add_route("/v1/operations/{operation_id}", OperationItem(service))


def _add_images(app: App, service: Service) -> None:
    app.add_route("/v1/references", ReferenceCollection(service))
    app.add_route("/v1/images", ImageCollection(service))
    app.add_route("/v1/images/{image_id}", ImageItem(service))
    app.add_route("/v1/images/{image_id}/pin", ImagePin(service))
    app.add_route("/v1/images/{image_id}/bootset", ImageBootSet(service))
    app.add_route("/v1/images/{image_id}/verify", ImageVerification(service))
    shared = SharedImages(service.configuration, service.db)
    app.add_route("/v1/images/{image_id}/manifest", ImageManifest(shared))
    app.add_route("/v1/chunks/{digest}", ChunkItem(shared))
    app.add_route("/v1/cache", CacheStatus(service))
    app.add_route("/v1/cache/plan", CachePlan(service))
    app.add_route("/v1/cache/evict", CacheEviction(service))
    app.add_route("/v1/cache/scrub", CacheScrub(service))


def _add_accounts(app: App, service: Service) -> None:
    account = "/v1/accounts/{name}"
    settings = service.configuration.api
    login = Login(settings, service.db)
    app.add_route("/v1/session", SessionItem(login, service.db, settings.session_idle_s))
    app.add_route("/v1/accounts", AccountCollection(service))
    app.add_route(account, AccountItem(service, login))
    app.add_route(account + "/tokens", TokenCollection(service))
    app.add_route(account + "/tokens/{token_id}", TokenItem(service))
    app.add_route("/v1/audit", AuditLog(service))
    app.add_route("/v1/audit/prune", AuditPrune(service))


def _add_disks(app: App, service: Service) -> None:
    disk = "/v1/disks/{uuid}"
    app.add_route("/v1/disks", DiskCollection(service))
    app.add_route(disk, DiskItem(service))
    app.add_route(disk + "/content", DiskContent(service))
    app.add_route(disk + "/content/upload", DiskUpload(service))
    app.add_route(disk + "/hydrate", DiskHydration(service))
    app.add_route(disk + "/restore", DiskRestoration(service))
    app.add_route(disk + "/save", DiskSave(service))
    app.add_route(disk + "/shares", ShareCollection(service))
    app.add_route(disk + "/shares/{user}", ShareItem(service))
    snapshots = disk + "/snapshots"
    app.add_route(snapshots, SnapshotCollection(service))
    app.add_route(snapshots + "/{snapshot_id}", SnapshotItem(service))
    app.add_route(snapshots + "/{snapshot_id}/rollback", SnapshotRollback(service))


def _add_attachments(app: App, service: Service) -> None:
    app.add_route("/v1/attachments", AttachmentOverview(service))
    collection = "/v1/disks/{uuid}/attachments"
    app.add_route(collection, AttachmentCollection(service))
    attachment = AttachmentItem(service)
    app.add_route(collection + "/{attachment_id}", attachment)
    for suffix in ("migrate", "complete", "lease"):
        app.add_route(f"{collection}/{{attachment_id}}/{suffix}", attachment, suffix=suffix)
    app.add_route("/v1/launches", LaunchCollection(service))
    app.add_route("/v1/launches/{instance}", LaunchItem(service))
    app.add_route("/v1/launches/{instance}/lease", LaunchLease(service))
