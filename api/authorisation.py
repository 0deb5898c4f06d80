"""Who may do what: one row for each route and method, and the middleware that goes by it.

HEAD has GET's row. A row says which scope a token needs, which role its owner, and what the caller must be allowed of
the object that the address names. Whatever has no row is not served: `create_app` refuses to start.
What a list shows, and what else a body names, is decided in `stratocache.fs`, which judges all of
this again within its transactions.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import falcon
import falcon.inspect

from stratocache.cache.errors import Internal, Refused
from stratocache.fs import attachment_intents, inventory, launch_intents, operation_intents, rights
from stratocache.fs.records import ROLES, Caller, Role, Scope
from stratocache.fs.state import Database

ObjectRule = Literal[
    "none", "disk-see", "disk-read", "disk-write", "disk-own", "attachment-end", "attachment-own",
    "launch-see", "launch-end", "launch-own", "operation", "operation-end", "self",
]  # fmt: skip
"""What must be allowed of the object: `end` also to operators, `operation` to who asked and to
operators, `self` to the account itself and to administrators. To end an operation needs the scope
that to ask for it needed."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What a request needs."""

    scope: Scope | None
    """None = any: what there is to know before one knows anything."""
    role: Role = "user"
    object: ObjectRule = "none"
    action: str = ""
    """What the audit log calls it; empty for what only reads."""
    open: bool = False
    """Whether strangers may."""


_Judge = Callable[[Database, Caller, dict[str, Any]], None]
_SCOPES_OF_KINDS: dict[str, Scope] = {
    **dict.fromkeys(("fetch", "resolve", "delete-image", "verify-image", "evict"), "images"),
    **dict.fromkeys(("launch", "halt", "attach", "detach", "migrate"), "launch"),
}
"""Of operations; all others are of disks."""
_OPEN = Rule(None, open=True)
_READ = Rule("read")
_OPERATORS_READ = Rule("read", "operator")

_DISK = "/v1/disks/{uuid}"
_SNAPSHOT = _DISK + "/snapshots/{snapshot_id}"
_ATTACHMENT = _DISK + "/attachments/{attachment_id}"
_IMAGE = "/v1/images/{image_id}"
_LAUNCH = "/v1/launches/{instance}"
_ACCOUNT = "/v1/accounts/{name}"
_OPERATION = "/v1/operations/{operation_id}"

RULES: dict[tuple[str, str], Rule] = {
    ("GET", "/healthz"): _OPEN,
    ("GET", "/readyz"): _OPEN,
    ("GET", "/metrics"): _READ,
    ("GET", "/openapi.json"): _OPEN,
    ("GET", "/v1"): Rule(None),
    ("GET", "/v1/overview"): _READ,
    ("GET", "/v1/events"): _READ,
    # images and the cache
    ("GET", "/v1/images"): _READ,
    ("POST", "/v1/images"): Rule("images", action="image.fetch"),
    ("POST", "/v1/references"): Rule("images", action="reference.resolve"),
    ("GET", _IMAGE): _READ,
    ("DELETE", _IMAGE): Rule("images", "operator", action="image.delete"),
    ("PUT", _IMAGE + "/pin"): Rule("images", "operator", action="image.pin"),
    ("DELETE", _IMAGE + "/pin"): Rule("images", "operator", action="image.unpin"),
    ("GET", _IMAGE + "/bootset"): _READ,
    ("PUT", _IMAGE + "/bootset"): Rule("images", "operator", action="image.bootset"),
    ("POST", _IMAGE + "/verify"): Rule("images", "operator", action="image.verify"),
    ("GET", _IMAGE + "/manifest"): _OPERATORS_READ,
    ("GET", "/v1/chunks/{digest}"): _OPERATORS_READ,
    ("GET", "/v1/cache"): _READ,
    ("GET", "/v1/cache/plan"): _READ,
    ("POST", "/v1/cache/evict"): Rule("images", "operator", action="cache.evict"),
    ("POST", "/v1/cache/scrub"): Rule("images", "operator", action="cache.scrub"),
    # disks
    ("GET", "/v1/disks"): _READ,
    ("POST", "/v1/disks"): Rule("disks", action="disk.create"),
    ("GET", _DISK): Rule("read", object="disk-see"),
    ("PATCH", _DISK): Rule("disks", object="disk-own", action="disk.change"),
    ("DELETE", _DISK): Rule("disks", object="disk-own", action="disk.delete"),
    ("GET", _DISK + "/content"): Rule("read", object="disk-read"),
    ("PUT", _DISK + "/content"): Rule("disks", object="disk-write", action="disk.upload"),
    ("GET", _DISK + "/content/upload"): Rule("read", object="disk-write"),
    ("DELETE", _DISK + "/content/upload"): Rule(
        "disks", object="disk-write", action="disk.upload-abandon"
    ),
    ("POST", _DISK + "/hydrate"): Rule("disks", object="disk-own", action="disk.hydrate"),
    ("POST", _DISK + "/restore"): Rule("disks", object="disk-own", action="disk.restore"),
    ("POST", _DISK + "/save"): Rule("disks", object="disk-own", action="disk.save"),
    ("GET", _DISK + "/shares"): Rule("read", object="disk-see"),
    ("PUT", _DISK + "/shares/{user}"): Rule("disks", object="disk-own", action="disk.share"),
    ("DELETE", _DISK + "/shares/{user}"): Rule("disks", object="disk-see", action="disk.unshare"),
    ("GET", _DISK + "/snapshots"): Rule("read", object="disk-see"),
    ("POST", _DISK + "/snapshots"): Rule("disks", object="disk-write", action="snapshot.create"),
    ("GET", _SNAPSHOT): Rule("read", object="disk-see"),
    ("DELETE", _SNAPSHOT): Rule("disks", object="disk-own", action="snapshot.delete"),
    ("POST", _SNAPSHOT + "/rollback"): Rule(
        "disks", object="disk-own", action="snapshot.rollback"
    ),
    # attachments and launches
    ("GET", "/v1/attachments"): _READ,
    ("GET", _DISK + "/attachments"): Rule("read", object="disk-see"),
    ("POST", _DISK + "/attachments"): Rule("launch", object="disk-read", action="disk.attach"),
    ("GET", _ATTACHMENT): Rule("read"),
    ("DELETE", _ATTACHMENT): Rule("launch", object="attachment-end", action="disk.detach"),
    ("POST", _ATTACHMENT + "/migrate"): Rule(
        "launch", object="attachment-own", action="disk.migrate"
    ),
    ("POST", _ATTACHMENT + "/complete"): Rule(
        "launch", object="attachment-own", action="disk.migrate-complete"
    ),
    ("PUT", _ATTACHMENT + "/lease"): Rule(
        "launch", object="attachment-own", action="disk.lease"
    ),
    ("GET", "/v1/launches"): _READ,
    ("POST", "/v1/launches"): Rule("launch", action="launch.create"),
    ("GET", _LAUNCH): Rule("read", object="launch-see"),
    ("DELETE", _LAUNCH): Rule("launch", object="launch-end", action="launch.halt"),
    ("PUT", _LAUNCH + "/lease"): Rule("launch", object="launch-own", action="launch.lease"),
    # accounts
    ("POST", "/v1/session"): Rule(None, action="session.start", open=True),
    ("GET", "/v1/session"): Rule(None),
    ("DELETE", "/v1/session"): Rule(None, action="session.end"),
    ("GET", "/v1/accounts"): Rule("read", "admin"),
    ("POST", "/v1/accounts"): Rule("admin", "admin", action="account.create"),
    ("GET", _ACCOUNT): Rule("read", object="self"),
    ("PATCH", _ACCOUNT): Rule("admin", object="self", action="account.change"),
    ("DELETE", _ACCOUNT): Rule("admin", "admin", action="account.delete"),
    ("GET", _ACCOUNT + "/tokens"): Rule("read", object="self"),
    ("POST", _ACCOUNT + "/tokens"): Rule("admin", object="self", action="token.create"),
    ("DELETE", _ACCOUNT + "/tokens/{token_id}"): Rule(
        "admin", object="self", action="token.delete"
    ),
    ("GET", "/v1/audit"): Rule("read", "admin"),
    ("POST", "/v1/audit/prune"): Rule("admin", "admin", action="audit.prune"),
    # work under way
    ("GET", "/v1/operations"): _READ,
    ("GET", _OPERATION): Rule("read", object="operation"),
    ("DELETE", _OPERATION): Rule(None, object="operation-end", action="operation.cancel"),
    # pages
    ("GET", "/static/{name}"): _OPEN,
    ("GET", "/"): _READ,
    ("GET", "/images"): _READ,
    ("GET", "/images/{image_id}"): _READ,
    ("GET", "/disks"): _READ,
    ("GET", "/disks/{uuid}"): Rule("read", object="disk-see"),
    ("GET", "/attachments"): _READ,
    ("GET", "/operations"): _READ,
    ("GET", "/operations/{operation_id}"): Rule("read", object="operation"),
    ("GET", "/events"): _READ,
    ("GET", "/cache"): _READ,
    ("GET", "/accounts"): Rule("read", "admin"),
    ("GET", "/accounts/{name}"): Rule("read", object="self"),
    ("GET", "/audit"): Rule("read", "admin"),
    ("GET", "/login"): _OPEN,
    ("POST", "/login"): Rule(None, action="session.start", open=True),
    ("GET", "/logout"): Rule(None),
    ("POST", "/logout"): Rule(None, action="session.end", open=True),
}  # fmt: skip


def allows(caller: Caller | None, method: str, template: str) -> bool:
    """Tell whether somebody, None is a stranger, may use a route at all, whatever it is used on."""
    rule = RULES[(method, template)]
    if caller is None or rule.open:
        return rule.open
    in_scope = rule.scope is None or rule.scope in caller.scopes
    return in_scope and ROLES.index(caller.role) >= ROLES.index(rule.role)


def rule_of(method: str, template: str | None) -> Rule | None:
    """Return the row of a route; None for methods that the route does not take. HEAD is as GET."""
    return RULES.get((_as_in_table(method), template or ""))


def find_route(method: str, path: str) -> tuple[str, dict[str, str]] | None:
    """Return the template that an address matches, with its parameters: for what is refused before
    it is routed."""
    method = _as_in_table(method)
    for (known, template), pattern in _PATTERNS.items():
        found = pattern.fullmatch(path) if known == method else None
        if found is not None:
            return template, found.groupdict()
    return None


def is_open(method: str, path: str) -> bool:
    """Tell whether strangers may send this."""
    method = _as_in_table(method)
    return any(known == method and pattern.fullmatch(path) for known, pattern in _OPEN_PATTERNS)


def _as_in_table(method: str) -> str:
    return "GET" if method == "HEAD" else method


def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{([^}]*)\}", template)
    return re.compile(
        "".join(
            f"(?P<{part}>[^/]+)" if number % 2 else re.escape(part)
            for number, part in enumerate(parts)
        )
    )


_PATTERNS = {route: _pattern(route[1]) for route in RULES}
_OPEN_PATTERNS = [
    (method, pattern) for (method, template), pattern in _PATTERNS.items()
    if RULES[method, template].open
]  # fmt: skip


def require_rules(app: falcon.App[falcon.Request, falcon.Response]) -> None:
    """Raise `Internal` (`route-without-rule`) unless every route has a row, and every row a route."""
    routes = {
        (_as_in_table(method.method), route.path)
        for route in falcon.inspect.inspect_routes(app)
        for method in route.methods
        if not method.internal
    }
    for method, path in routes ^ RULES.keys():
        what = "has no row" if (method, path) in routes else "is no route, but has a row"
        raise Internal("route-without-rule", f"{method} {path} {what} in api/authorisation.py.")


class Authorisation:
    """Middleware that refuses what the table does not allow, before the resource is called."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def process_resource(
        self,
        request: falcon.Request,
        response: falcon.Response,
        resource: object,
        parameters: dict[str, Any],
    ) -> None:
        """Judge a request; raises `Refused` (`scope-missing`, `not-allowed`, …) and `NotFound`."""
        request.context.parameters = dict(parameters)
        rule = rule_of(request.method, request.uri_template)
        if rule is None or rule.open:
            return
        caller = request.context.caller
        assert isinstance(caller, Caller)
        if rule.scope is not None and rule.scope not in caller.scopes:
            raise _scope_missing(rule.scope)
        require_role(caller, rule.role)
        _JUDGES[rule.object](self._db, caller, parameters)


def require_role(caller: Caller, role: Role) -> None:
    """Raise `Refused` (`not-allowed`) for somebody of a lesser role."""
    if ROLES.index(caller.role) < ROLES.index(role):
        who = "administrators" if role == "admin" else "operators and administrators"
        raise Refused("not-allowed", f"Only {who} may do this.")


def _scope_missing(scope: Scope) -> Refused:
    return Refused("scope-missing", f"This token may not do this; use one with scope {scope}.")


def _judge_disk(right: str) -> _Judge:
    def judge(db: Database, caller: Caller, parameters: dict[str, Any]) -> None:
        disk = inventory.disk(db, caller, parameters["uuid"])
        if right == "read":
            rights.require_read(db, caller, disk)
        elif not getattr(rights.rights(db, caller, disk), right):
            raise Refused("disk-not-yours", f"Disk {disk.uuid} belongs to {disk.owner}.")

    return judge


def _judge_attachment(*, ending: bool) -> _Judge:
    def judge(db: Database, caller: Caller, parameters: dict[str, Any]) -> None:
        attachment_intents.own_attachment(db, caller, parameters["attachment_id"], ending=ending)

    return judge


def _judge_launch(*, ending: bool) -> _Judge:
    def judge(db: Database, caller: Caller, parameters: dict[str, Any]) -> None:
        launch_intents.own_launch(db, caller, parameters["instance"], ending=ending)

    return judge


def _judge_operation(db: Database, caller: Caller, parameters: dict[str, Any]) -> None:
    operation_intents.own_operation(db, caller, parameters["operation_id"])


def _judge_ending(db: Database, caller: Caller, parameters: dict[str, Any]) -> None:
    operation = operation_intents.own_operation(db, caller, parameters["operation_id"])
    scope = _SCOPES_OF_KINDS.get(operation.kind, "disks")
    if scope not in caller.scopes:
        raise _scope_missing(scope)


def _judge_self(db: Database, caller: Caller, parameters: dict[str, Any]) -> None:
    if parameters["name"] != caller.name:
        require_role(caller, "admin")


def _judge_nothing(db: Database, caller: Caller, parameters: dict[str, Any]) -> None:
    pass


_JUDGES: dict[ObjectRule, _Judge] = {
    "none": _judge_nothing,
    "disk-see": _judge_disk("see"),
    "disk-read": _judge_disk("read"),
    "disk-write": _judge_disk("write"),
    "disk-own": _judge_disk("own"),
    "attachment-end": _judge_attachment(ending=True),
    "attachment-own": _judge_attachment(ending=False),
    "launch-see": _judge_launch(ending=True),
    "launch-end": _judge_launch(ending=True),
    "launch-own": _judge_launch(ending=False),
    "operation": _judge_operation,
    "operation-end": _judge_ending,
    "self": _judge_self,
}
