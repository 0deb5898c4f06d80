"""Who may do what, written down a second time: for each route and method what each role gets of each
object, and which scope its token needs; HEAD is as GET. Nothing here is derived from the program."""

from dataclasses import dataclass, field
from typing import Any, Literal

Relation = Literal["own", "read", "write", "public", "private", "none"]
"""Of the caller to the object: it is theirs, shared with them (twice), everybody's, or another's."""

DISK: tuple[Relation, ...] = ("own", "read", "write", "public", "private")
OWNED: tuple[Relation, ...] = ("own", "private")
NONE: tuple[Relation, ...] = ("none",)

# for user, operator and admin, a letter for each relation: A allowed, F 403, N 404 as if not there,
# C 409 as nobody takes away their own rights
Letters = tuple[str, str, str]
SEE: Letters = ("AAAAN", "AAAAA", "AAAAA")
READ: Letters = ("AAAAN", "AAAAF", "AAAAA")
WRITE: Letters = ("AFAFN", "AFAFF", "AAAAA")
OWN: Letters = ("AFFFN", "AFFFF", "AAAAA")
END: Letters = ("AFFFN", "AAAAA", "AAAAA")
MINE_SEE: Letters = ("AN", "AA", "AA")
MINE_OWN: Letters = ("AN", "AF", "AA")
SELF: Letters = ("AF", "AF", "AA")
ADMINS_SELF: Letters = ("FF", "FF", "CA")
ALL: Letters = ("A", "A", "A")
OPERATORS: Letters = ("F", "A", "A")
ADMINS: Letters = ("F", "F", "A")


@dataclass(frozen=True)
class Row:
    """One route and method."""

    scope: str
    """That the token needs; any = every one will do, open = nothing is needed at all."""
    letters: Letters
    allowed: tuple[int, ...]
    """The status, or statuses, of who is allowed: the request itself is right."""
    relations: tuple[Relation, ...] = NONE
    body: Any = None
    query: str = ""
    headers: dict[str, str] = field(default_factory=dict)


RAW = "application/octet-stream"
_DISK = "/v1/disks/{uuid}"
_SNAPSHOT = _DISK + "/snapshots/{snapshot_id}"
_ATTACHMENT = _DISK + "/attachments/{attachment_id}"
_IMAGE = "/v1/images/{image_id}"
_LAUNCH = "/v1/launches/{instance}"
_OPERATION = "/v1/operations/{operation_id}"
_ACCOUNT = "/v1/accounts/{name}"
_SIZE = {"size_bytes": 2**20}


def _list(*, letters: Letters = ALL) -> Row:
    return Row("read", letters, (200,))


def _disk(scope: str, letters: Letters, *allowed: int, **more: Any) -> Row:
    return Row(scope, letters, allowed, DISK, **more)


ROWS: dict[tuple[str, str], Row] = {
    ("GET", "/healthz"): Row("open", ALL, (200,)),
    ("GET", "/readyz"): Row("open", ALL, (503,)),
    ("GET", "/openapi.json"): Row("open", ALL, (200,)),
    ("GET", "/static/{name}"): Row("open", ALL, (404,)),
    ("POST", "/v1/session"): Row("open", ALL, (400,), body={}),
    ("GET", "/v1"): Row("any", ALL, (200,)),
    ("GET", "/v1/session"): Row("any", ALL, (200,)),
    ("DELETE", "/v1/session"): Row("any", ALL, (204,)),
    ("GET", "/metrics"): _list(),
    ("GET", "/v1/overview"): _list(),
    ("GET", "/v1/events"): _list(),
    # images and the cache
    ("GET", "/v1/images"): _list(),
    ("POST", "/v1/images"): Row(
        "images", ALL, (202,), body={"reference": "some"}, query="?wait=0"
    ),
    ("POST", "/v1/references"): Row(
        "images", ALL, (202,), body={"reference": "some"}, query="?wait=0"
    ),
    ("GET", _IMAGE): _list(),
    ("DELETE", _IMAGE): Row("images", OPERATORS, (202,), query="?wait=0"),
    ("PUT", _IMAGE + "/pin"): Row("images", OPERATORS, (200,)),
    ("DELETE", _IMAGE + "/pin"): Row("images", OPERATORS, (200,)),
    ("GET", _IMAGE + "/bootset"): Row("read", ALL, (404,)),
    ("PUT", _IMAGE + "/bootset"): Row("images", OPERATORS, (400, 422), body={}),
    ("POST", _IMAGE + "/verify"): Row("images", OPERATORS, (202,), query="?wait=0"),
    ("GET", _IMAGE + "/manifest"): Row("read", OPERATORS, (404,)),
    ("GET", "/v1/chunks/{digest}"): Row("read", OPERATORS, (404,)),
    ("GET", "/v1/cache"): _list(),
    ("GET", "/v1/cache/plan"): _list(),
    ("POST", "/v1/cache/evict"): Row("images", OPERATORS, (202,), body={}, query="?wait=0"),
    ("POST", "/v1/cache/scrub"): Row("images", OPERATORS, (200,), body={}),
    # disks
    ("GET", "/v1/disks"): _list(),
    ("POST", "/v1/disks"): Row("disks", ALL, (202,), body=_SIZE, query="?wait=0"),
    ("GET", _DISK): _disk("read", SEE, 200),
    ("PATCH", _DISK): _disk("disks", OWN, 200, body={"tag": "x"}),
    ("DELETE", _DISK): _disk("disks", OWN, 202, query="?wait=0&snapshots=delete"),
    ("GET", _DISK + "/content"): _disk("read", READ, 200),
    ("PUT", _DISK + "/content"): _disk(
        "disks", WRITE, 200, body=b"x",
        headers={"Content-Type": RAW, "Content-Range": f"bytes 0-0/{2**20}"},
    ),
    ("GET", _DISK + "/content/upload"): _disk("read", WRITE, 404),
    ("DELETE", _DISK + "/content/upload"): _disk("disks", WRITE, 204),
    ("POST", _DISK + "/hydrate"): _disk("disks", OWN, 409),
    ("POST", _DISK + "/restore"): _disk("disks", OWN, 409),
    ("POST", _DISK + "/save"): _disk("disks", OWN, 202, body={}, query="?wait=0"),
    ("GET", _DISK + "/shares"): _disk("read", SEE, 200),
    ("PUT", _DISK + "/shares/{user}"): _disk("disks", OWN, 201, body={"access": "read"}),
    ("DELETE", _DISK + "/shares/{user}"): _disk("disks", OWN, 404),
    ("GET", _DISK + "/snapshots"): _disk("read", SEE, 200),
    ("POST", _DISK + "/snapshots"): _disk("disks", WRITE, 202, body={}, query="?wait=0"),
    ("GET", _SNAPSHOT): _disk("read", SEE, 200),
    ("DELETE", _SNAPSHOT): _disk("disks", OWN, 202, query="?wait=0"),
    ("POST", _SNAPSHOT + "/rollback"): _disk("disks", OWN, 202, query="?wait=0"),
    # attachments, whose owner is the disk's
    ("GET", "/v1/attachments"): _list(),
    ("GET", _DISK + "/attachments"): _disk("read", SEE, 200),
    ("POST", _DISK + "/attachments"): _disk(
        "launch", READ, 202, body={"instance": "vm", "access": "ro"}, query="?wait=0"
    ),
    ("GET", _ATTACHMENT): _disk("read", SEE, 200),
    ("DELETE", _ATTACHMENT): _disk("launch", END, 202, query="?wait=0&force=true"),
    ("POST", _ATTACHMENT + "/migrate"): _disk(
        "launch", OWN, 202, body={"instance": "vm-2"}, query="?wait=0"
    ),
    ("POST", _ATTACHMENT + "/complete"): _disk("launch", OWN, 200, query="?wait=0"),
    ("PUT", _ATTACHMENT + "/lease"): _disk("launch", OWN, 200, body={"lease_s": 60}),
    # launches, operations, accounts
    ("GET", "/v1/launches"): _list(),
    ("POST", "/v1/launches"): Row(
        "launch", ALL, (202,), body={"reference": "some", "instance": "{fresh}"}, query="?wait=0"
    ),
    ("GET", _LAUNCH): Row("read", MINE_SEE, (200,), OWNED),
    ("DELETE", _LAUNCH): Row("launch", MINE_SEE, (202,), OWNED, query="?wait=0"),
    ("PUT", _LAUNCH + "/lease"): Row("launch", MINE_OWN, (200,), OWNED, body={"lease_s": 60}),
    ("GET", "/v1/operations"): _list(),
    ("GET", _OPERATION): Row("read", MINE_SEE, (200,), OWNED),
    ("DELETE", _OPERATION): Row("images", MINE_SEE, (202,), OWNED, query="?wait=0"),
    ("GET", "/v1/accounts"): _list(letters=ADMINS),
    ("POST", "/v1/accounts"): Row("admin", ADMINS, (201,), body={"name": "{fresh}"}),
    ("GET", _ACCOUNT): Row("read", SELF, (200,), OWNED),
    ("PATCH", _ACCOUNT): Row("admin", SELF, (200,), OWNED, body={}),
    ("DELETE", _ACCOUNT): Row("admin", ADMINS_SELF, (204,), OWNED),
    ("GET", _ACCOUNT + "/tokens"): Row("read", SELF, (200,), OWNED),
    ("POST", _ACCOUNT + "/tokens"): Row(
        "admin", SELF, (201,), OWNED, body={"scopes": ["admin"]}
    ),
    ("DELETE", _ACCOUNT + "/tokens/{token_id}"): Row("admin", SELF, (204,), OWNED),
    ("GET", "/v1/audit"): _list(letters=ADMINS),
    ("POST", "/v1/audit/prune"): Row("admin", ADMINS, (200,), body={"before": "2020-01-01"}),
    # pages
    ("GET", "/"): _list(),
    ("GET", "/images"): _list(),
    ("GET", "/images/{image_id}"): _list(),
    ("GET", "/disks"): _list(),
    ("GET", "/disks/{uuid}"): _disk("read", SEE, 200),
    ("GET", "/attachments"): _list(),
    ("GET", "/operations"): _list(),
    ("GET", "/operations/{operation_id}"): Row("read", MINE_SEE, (200,), OWNED),
    ("GET", "/events"): _list(),
    ("GET", "/cache"): _list(),
    ("GET", "/accounts"): _list(letters=ADMINS),
    ("GET", "/accounts/{name}"): Row("read", SELF, (200,), OWNED),
    ("GET", "/audit"): _list(letters=ADMINS),
    ("GET", "/login"): Row("open", ALL, (200,)),
    ("POST", "/login"): Row("open", ALL, (415,), body={}),
    ("GET", "/logout"): Row("any", ALL, (200,)),
    ("POST", "/logout"): Row("open", ALL, (303,)),
}  # fmt: skip
