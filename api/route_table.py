"""What every route takes and answers, as data: `openapi` describes the API by it.

One row for each route and method of `stratocache.api.authorisation`; pages for people have none.
Every route may answer with a problem document; only some are listed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from stratocache.api import (
    attachment_views,
    cache_views,
    image_views,
    models,
    query,
    representations,
)
from stratocache.api.listing import Listing
from stratocache.api.representations import OperationView, Representation
from stratocache.api.resources.accounts import (
    ACCOUNTS,
    TOKENS,
    AccountView,
    NewTokenView,
    TokenView,
)
from stratocache.api.resources.attachments import ATTACHMENTS, OF_DISK
from stratocache.api.resources.audit import FILTERS, LINES_TYPE, AuditView, PruningView
from stratocache.api.resources.content import UploadView
from stratocache.api.resources.disks import DISKS
from stratocache.api.resources.events import EVENTS, STREAM_TYPE
from stratocache.api.resources.images import IMAGES
from stratocache.api.resources.launches import LAUNCHES
from stratocache.api.resources.operations import OPERATIONS
from stratocache.api.resources.overview import OverviewView
from stratocache.api.resources.sessions import SessionView
from stratocache.api.resources.shares import SHARES
from stratocache.api.resources.snapshots import SNAPSHOTS
from stratocache.fs.local_map import CELLS_MAX

Schema: TypeAlias = dict[str, Any]

JSON_TYPE = "application/json"
RAW_TYPE = "application/octet-stream"
QCOW2_TYPE = "application/x-qcow2"
METRICS_TYPE = "text/plain"
MANIFEST_TYPE = "application/vnd.casync.index"


@dataclass(frozen=True)
class PageOf:
    """A page of a list: its name, and what is in it."""

    name: str
    item: type[Representation]


Content: TypeAlias = type[Representation] | PageOf | Schema
"""What a body is: a model, a page of a list, or a JSON Schema."""


Replay: TypeAlias = Literal["stored", "rebuilt", "never"]
"""How a POST with a key that was sent before is answered: as it was then, by what is at its address
now (it has a secret), or not at all (the secret is shown once)."""


@dataclass(frozen=True)
class Route:
    """One method of one route."""

    summary: str
    answers: Mapping[int, Mapping[str, Content]]
    """By status, by media type; no media type = no body."""
    body: Mapping[str, type[models.RequestModel] | Schema] = field(default_factory=dict)
    parameters: Mapping[str, Schema] = field(default_factory=dict)
    """Of the query."""
    headers: Mapping[str, Schema] = field(default_factory=dict)
    replay: Replay = "stored"
    problems: Mapping[int, str] = field(default_factory=dict)
    """Problems worth preparing for, by status: when they come."""


_TEXT: Schema = {"type": "string"}
_BYTES: Schema = {"type": "string", "format": "binary"}
_NOTHING: Mapping[str, Content] = {}
_WAIT = {"wait": {"type": "number", "minimum": 0, "maximum": query.WAIT_S_MAX}}
_EPOCH = {"epoch": {"type": "integer", "minimum": 0, "maximum": 10**18 - 1}}
_FORCE = {"force": {"type": "string", "enum": ["false", "true"]}}
_MATCH = {"If-Match": {"type": "string"}}
_STATUS: Schema = {"type": "object", "required": ["status"], "properties": {"status": _TEXT}}
_LIMITS: Schema = {"type": "object", "additionalProperties": {"type": "integer"}}
_CALLER: Schema = {
    "type": "object",
    "required": ["name", "role", "scopes", "administrator"],
    "properties": {
        "name": _TEXT,
        "role": {"type": "string", "enum": ["user", "operator", "admin"]},
        "scopes": {"type": "array", "items": _TEXT},
        "administrator": {"type": "boolean"},
    },
}
_INDEX: Schema = {
    "type": "object",
    "required": ["name", "version", "api", "capabilities", "catalogues", "limits", "caller"],
    "properties": {
        "name": _TEXT,
        "version": _TEXT,
        "api": _TEXT,
        "capabilities": {"type": "array", "items": _TEXT},
        "catalogues": {"type": "array", "items": _TEXT},
        "limits": _LIMITS,
        "caller": _CALLER,
        "tls_certificate_sha256": {"type": ["string", "null"]},
    },
}
_BOOT_SET: Schema = {"type": "object"}
_PLACES = {
    429: "The caller has too many under way, or asks too often; again after Retry-After.",
    503: "Others have all places of this host; again after Retry-After.",
}


def _json(content: Content) -> Mapping[str, Content]:
    return {JSON_TYPE: content}


def _body(model: type[models.RequestModel]) -> dict[str, type[models.RequestModel] | Schema]:
    return {JSON_TYPE: model}


def _any(*models_: type[Representation]) -> Schema:
    return {"anyOf": list(models_)}


def _page(listing: Listing) -> dict[str, Schema]:
    return {
        "limit": {"type": "integer", "minimum": 1, "maximum": query.PAGE_LENGTH_MAX},
        "after": {"type": "string"},
        "sort": {"type": "string", "enum": list(listing.sorts)},
        **{name: {"type": "string"} for name in listing.filters},
    }


def _list(summary: str, name: str, item: type[Representation], listing: Listing) -> Route:
    return Route(summary, {200: _json(PageOf(name, item))}, parameters=_page(listing))


_ACCEPTED = {202: _json(OperationView)}
_GONE: Mapping[int, Mapping[str, Content]] = {204: _NOTHING, **_ACCEPTED}
_DISK = "/v1/disks/{uuid}"
_SNAPSHOT = _DISK + "/snapshots/{snapshot_id}"
_ATTACHMENT = _DISK + "/attachments/{attachment_id}"
_IMAGE = "/v1/images/{image_id}"
_LAUNCH = "/v1/launches/{instance}"
_ACCOUNT = "/v1/accounts/{name}"
_DIGESTS = {"Content-Digest": _TEXT, "Repr-Digest": _TEXT}
_IMAGE_SHOWN = {200: _json(image_views.ImageDetails)}
_DISK_SHOWN = {200: _json(representations.DiskDetails)}
_ATTACHMENT_SHOWN = {200: _json(attachment_views.AttachmentView)}
_ATTACHMENT_MADE = {201: _json(attachment_views.AttachmentView), **_ACCEPTED}
_LAUNCH_SHOWN = {200: _json(attachment_views.LaunchView)}
_CONTENT = {
    200: {RAW_TYPE: _BYTES, QCOW2_TYPE: _BYTES},
    206: {RAW_TYPE: _BYTES, QCOW2_TYPE: _BYTES},
}
_CONTENT_HEADERS = {"Range": _TEXT, "If-Range": _TEXT}
_CONTENT_OF = {
    "snapshot": _TEXT, "format": {"type": "string", "enum": ["raw", "qcow2"]}
}  # fmt: skip

ROUTES: dict[tuple[str, str], Route] = {
    ("GET", "/healthz"): Route("Whether this process answers.", {200: _json(_STATUS)}),
    ("GET", "/readyz"): Route("Whether every part works.", {200: _json(_STATUS)}),
    ("GET", "/metrics"): Route("Metrics for Prometheus.", {200: {METRICS_TYPE: _TEXT}}),
    ("GET", "/openapi.json"): Route("This document.", {200: _json({"type": "object"})}),
    ("GET", "/v1"): Route("Version, capabilities, limits, the caller.", {200: _json(_INDEX)}),
    ("GET", "/v1/overview"): Route("How things are.", {200: _json(OverviewView)}),
    ("GET", "/v1/events"): Route(
        "Events, a page at a time or as they happen (server-sent events).",
        {200: {
            JSON_TYPE: PageOf("events", representations.EventView),
            STREAM_TYPE: _TEXT,
        }},
        parameters=_page(EVENTS),
        headers={"Last-Event-ID": _TEXT},
        problems=_PLACES,
    ),
    ("GET", "/v1/operations"): _list("Operations.", "operations", OperationView, OPERATIONS),
    ("GET", "/v1/operations/{operation_id}"): Route(
        "One operation, after its end or a while.", {200: _json(OperationView)}, parameters=_WAIT
    ),
    ("DELETE", "/v1/operations/{operation_id}"): Route(
        "Cancel an operation.", {200: _json(OperationView), **_ACCEPTED}, parameters=_WAIT
    ),
    # images and the cache
    ("POST", "/v1/references"): Route(
        "What a reference stands for, and why it is trusted or refused; fetches nothing.",
        {200: _json(OperationView), **_ACCEPTED},
        _body(models.ReferenceQuestion), _WAIT,
    ),
    ("GET", "/v1/images"): _list("Images.", "images", image_views.ImageView, IMAGES),
    ("POST", "/v1/images"): Route(
        "Fetch an image.", {201: _json(image_views.ImageDetails), **_ACCEPTED},
        _body(models.ImageFetch), _WAIT,
    ),
    ("GET", _IMAGE): Route(
        "One image.", _IMAGE_SHOWN,
        parameters={"map": {"type": "integer", "minimum": 1, "maximum": CELLS_MAX}},
    ),
    ("DELETE", _IMAGE): Route("Delete an image.", _GONE, parameters=_WAIT, headers=_MATCH),
    ("PUT", _IMAGE + "/pin"): Route("Never evict an image.", _IMAGE_SHOWN, headers=_MATCH),
    ("DELETE", _IMAGE + "/pin"): Route("Let an image be evicted.", _IMAGE_SHOWN, headers=_MATCH),
    ("GET", _IMAGE + "/bootset"): Route("What a boot reads.", {200: _json(_BOOT_SET)}),
    ("PUT", _IMAGE + "/bootset"): Route(
        "Take a boot set from elsewhere.", {204: _NOTHING}, {JSON_TYPE: _BOOT_SET}
    ),
    ("POST", _IMAGE + "/verify"): Route(
        "Hash all of an image, and repair it.", {200: _json(OperationView), **_ACCEPTED},
        parameters=_WAIT,
    ),
    ("GET", _IMAGE + "/manifest"): Route("A casync index.", {200: {MANIFEST_TYPE: _BYTES}}),
    ("GET", "/v1/chunks/{digest}"): Route(
        "The bytes of a chunk.", {200: {RAW_TYPE: _BYTES}}, parameters={"image": _TEXT}
    ),
    ("GET", "/v1/cache"): Route("Where the space has gone.", {200: _json(cache_views.StatusView)}),
    ("GET", "/v1/cache/plan"): Route(
        "What keeps each image, and what would go first.",
        {200: _json(_any(cache_views.PlanView, cache_views.OfflineView))},
        parameters={"offline": {"type": "boolean"}},
    ),
    ("POST", "/v1/cache/evict"): Route(
        "Make room, or say what would go.",
        {200: _json(_any(OperationView, cache_views.EvictionView)), **_ACCEPTED},
        _body(models.EvictionRequest), _WAIT,
    ),
    ("POST", "/v1/cache/scrub"): Route(
        "Begin, pause or resume the scrubber.", {200: _json(cache_views.ScrubView)},
        _body(models.ScrubRequest),
    ),
    # disks
    ("GET", "/v1/disks"): _list("Disks.", "disks", representations.DiskView, DISKS),
    ("POST", "/v1/disks"): Route(
        "Create a disk.", {201: _json(representations.DiskDetails), **_ACCEPTED},
        _body(models.DiskCreation), _WAIT,
    ),
    ("GET", _DISK): Route("One disk.", _DISK_SHOWN),
    ("PATCH", _DISK): Route(
        "Change or grow a disk.", {**_DISK_SHOWN, **_ACCEPTED}, _body(models.DiskChange), _WAIT,
        _MATCH,
    ),
    ("DELETE", _DISK): Route(
        "Delete a disk.", _GONE,
        parameters={**_WAIT, "snapshots": {"type": "string", "enum": ["delete"]}}, headers=_MATCH,
    ),
    ("GET", _DISK + "/content"): Route(
        "All bytes of a disk or a snapshot.", _CONTENT, parameters=_CONTENT_OF,
        headers=_CONTENT_HEADERS, problems=_PLACES,
    ),
    ("HEAD", _DISK + "/content"): Route(
        "How many bytes that are.", _CONTENT, parameters=_CONTENT_OF, headers=_CONTENT_HEADERS,
        problems=_PLACES,
    ),
    ("PUT", _DISK + "/content"): Route(
        "Upload a disk's new content, or the next part of it.", {200: _json(UploadView)},
        {RAW_TYPE: _BYTES, QCOW2_TYPE: _BYTES},
        headers={
            "Content-Range": _TEXT, "Upload-Offset": _TEXT, "Upload-Source": _TEXT, **_DIGESTS,
        },
        problems=_PLACES,
    ),
    ("GET", _DISK + "/content/upload"): Route("How far an upload is.", {200: _json(UploadView)}),
    ("HEAD", _DISK + "/content/upload"): Route("How far an upload is.", {200: _json(UploadView)}),
    ("DELETE", _DISK + "/content/upload"): Route("Give an upload up.", {204: _NOTHING}),
    ("POST", _DISK + "/hydrate"): Route(
        "Let an overlay become complete.", _ACCEPTED, parameters=_WAIT
    ),
    ("POST", _DISK + "/restore"): Route("Take a disk out of quarantine.", _DISK_SHOWN),
    ("POST", _DISK + "/save"): Route(
        "Save a disk as an image.", _ACCEPTED, _body(models.DiskSaving), _WAIT
    ),
    ("GET", _DISK + "/shares"): _list(
        "Who else may use a disk.", "shares", representations.ShareView, SHARES
    ),
    ("PUT", _DISK + "/shares/{user}"): Route(
        "Share a disk with a user.",
        {200: _json(representations.ShareView), 201: _json(representations.ShareView)},
        _body(models.ShareChange),
    ),
    ("DELETE", _DISK + "/shares/{user}"): Route("End a share.", {204: _NOTHING}),
    ("GET", _DISK + "/snapshots"): _list(
        "Snapshots of a disk.", "snapshots", representations.SnapshotView, SNAPSHOTS
    ),
    ("POST", _DISK + "/snapshots"): Route(
        "Take a snapshot.", {201: _json(representations.SnapshotView), **_ACCEPTED},
        _body(models.SnapshotCreation), _WAIT,
    ),
    ("GET", _SNAPSHOT): Route("One snapshot.", {200: _json(representations.SnapshotView)}),
    ("DELETE", _SNAPSHOT): Route("Delete a snapshot.", _GONE, parameters=_WAIT, headers=_MATCH),
    ("POST", _SNAPSHOT + "/rollback"): Route(
        "Let a disk be again what it was.", _GONE, parameters=_WAIT
    ),
    # attachments and launches
    ("GET", "/v1/attachments"): _list(
        "All attachments.", "attachments", attachment_views.AttachmentView, ATTACHMENTS
    ),
    ("GET", _DISK + "/attachments"): _list(
        "Attachments of a disk.", "attachments", attachment_views.AttachmentView, OF_DISK
    ),
    ("POST", _DISK + "/attachments"): Route(
        "Attach a disk.", _ATTACHMENT_MADE, _body(models.AttachmentCreation), _WAIT,
        replay="rebuilt",
    ),
    ("GET", _ATTACHMENT): Route("One attachment.", _ATTACHMENT_SHOWN),
    ("DELETE", _ATTACHMENT): Route(
        "Detach a disk.", _GONE, parameters={**_WAIT, **_FORCE, **_EPOCH}, headers=_MATCH
    ),
    ("POST", _ATTACHMENT + "/migrate"): Route(
        "Attach a disk a second time, to who takes over.", _ATTACHMENT_MADE,
        _body(models.MigrationCreation), {**_WAIT, **_EPOCH}, replay="rebuilt",
    ),
    ("POST", _ATTACHMENT + "/complete"): Route(
        "Cut the first attachment off.", {**_ATTACHMENT_SHOWN, **_ACCEPTED},
        parameters={**_WAIT, **_EPOCH}, replay="rebuilt",
    ),
    ("PUT", _ATTACHMENT + "/lease"): Route(
        "Renew a lease.", _ATTACHMENT_SHOWN, _body(models.LeaseRenewal), _EPOCH, _MATCH
    ),
    # accounts
    ("POST", "/v1/session"): Route(
        "Log in; the answer sets a cookie.", {201: _json(SessionView)}, _body(models.SessionCreation),
        replay="never",
    ),
    ("GET", "/v1/session"): Route("Who one is.", {200: _json(SessionView)}),
    ("DELETE", "/v1/session"): Route("Log out.", {204: _NOTHING}),
    ("GET", "/v1/accounts"): _list("Accounts.", "accounts", AccountView, ACCOUNTS),
    ("POST", "/v1/accounts"): Route(
        "Create an account.", {201: _json(AccountView)}, _body(models.AccountCreation),
        replay="never",
    ),
    ("GET", _ACCOUNT): Route("One account.", {200: _json(AccountView)}),
    ("PATCH", _ACCOUNT): Route(
        "Change an account, or one's own password.", {200: _json(AccountView)},
        _body(models.AccountChange), headers=_MATCH,
    ),
    ("DELETE", _ACCOUNT): Route("Delete an account.", {204: _NOTHING}, headers=_MATCH),
    ("GET", _ACCOUNT + "/tokens"): _list("Tokens.", "tokens", TokenView, TOKENS),
    ("POST", _ACCOUNT + "/tokens"): Route(
        "Make a token, which only this answer has.", {201: _json(NewTokenView)},
        _body(models.TokenCreation), replay="never",
    ),
    ("DELETE", _ACCOUNT + "/tokens/{token_id}"): Route(
        "Make a token worthless.", {204: _NOTHING}
    ),
    ("GET", "/v1/audit"): Route(
        "Who changed what, and who was refused.",
        {200: {JSON_TYPE: PageOf("audit", AuditView), LINES_TYPE: _TEXT}},
        parameters={
            "limit": {"type": "integer", "minimum": 1, "maximum": query.PAGE_LENGTH_MAX},
            "after": {"type": "integer", "minimum": 0, "maximum": 10**18 - 1},
            **dict.fromkeys(FILTERS, _TEXT),
        },
        problems=_PLACES,
    ),
    ("POST", "/v1/audit/prune"): Route(
        "Delete old lines of the audit log.", {200: _json(PruningView)}, _body(models.AuditPruning)
    ),
    ("GET", "/v1/launches"): _list(
        "Launches.", "launches", attachment_views.LaunchView, LAUNCHES
    ),
    ("POST", "/v1/launches"): Route(
        "Launch: everything that booting an instance needs.",
        {201: _json(attachment_views.LaunchView), **_ACCEPTED}, _body(models.LaunchCreation), _WAIT,
        replay="rebuilt",
    ),
    ("GET", _LAUNCH): Route("One launch.", _LAUNCH_SHOWN),
    ("DELETE", _LAUNCH): Route(
        "Halt: detach everything, delete what is volatile.", _GONE,
        parameters={**_WAIT, **_EPOCH, "outcome": {"type": "string", "enum": ["done", "failed"]}},
        headers=_MATCH,
    ),
    ("PUT", _LAUNCH + "/lease"): Route(
        "Renew a lease.", _LAUNCH_SHOWN, _body(models.LeaseRenewal), _EPOCH, _MATCH
    ),
}  # fmt: skip
