"""What requests carry: pydantic models with every limit, and how a body becomes one."""

import re
from typing import Annotated, Literal, TypeVar

import falcon
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from stratocache.api.problem import HttpProblem
from stratocache.api.sizes import SECTOR_BYTES, SIZE_BYTES_MAX, SIZE_BYTES_MIN
from stratocache.cache.entry import Compression
from stratocache.cache.errors import InvalidInput
from stratocache.fs.leases import LEASE_S_MAX, LEASE_S_MIN
from stratocache.fs.records import SAVED_VALID_DAYS, SCOPES, Role, Scope
from stratocache.fs.target import check_initiator_name

BODY_BYTES_MAX = 1024**2
DISKS_MAX = 64
TAG_CHARACTERS_MAX = 40
PASSWORD_CHARACTERS_MIN = 10
PASSWORD_CHARACTERS_MAX = 1024
TOKEN_S_MAX = 10 * 366 * 86400
MIGRATION_S = 600
MIGRATION_S_MAX = 3600

SizeBytes = Annotated[int, Field(ge=SIZE_BYTES_MIN, le=SIZE_BYTES_MAX, multiple_of=SECTOR_BYTES)]
Reference = Annotated[
    str, Field(min_length=1, max_length=4096, pattern=r"^[^\s\x00-\x1f\x7f]+$")
]  # no blanks: references are URLs and identifiers
InstanceId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
Tag = Annotated[str, Field(max_length=TAG_CHARACTERS_MAX, pattern=r"^[^\x00-\x1f\x7f]*$")]
Text = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00-\x1f\x7f]*$")]
_USER_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.@-]{0,63}$"
UserName = Annotated[str, Field(pattern=_USER_NAME)]
Uuid = Annotated[str, Field(pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")]
InitiatorName = Annotated[str, Field(max_length=223), AfterValidator(check_initiator_name)]
AnyPassword = Annotated[str, Field(max_length=PASSWORD_CHARACTERS_MAX)]
Password = Annotated[
    str,
    Field(min_length=PASSWORD_CHARACTERS_MIN, max_length=PASSWORD_CHARACTERS_MAX),
]
Quota = Annotated[int, Field(ge=0, le=2**62)]
LeaseSeconds = Annotated[int, Field(ge=LEASE_S_MIN, le=LEASE_S_MAX)]
Visibility = Literal["private", "public"]
DiskKind = Literal["machine", "data", "readonly"]
Access = Literal["rw", "ro"]


class RequestModel(BaseModel):
    """Base of every body: unknown fields are refused, nothing is converted in silence."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ImageFetch(RequestModel):
    """`POST /v1/images`."""

    reference: Reference
    pin: bool = False


class ReferenceQuestion(RequestModel):
    """`POST /v1/references`."""

    reference: Reference


class DiskCreation(RequestModel):
    """`POST /v1/disks`: blank of a size, or a clone of a reference or of a snapshot, or the content
    of a file on a web server, grown to the size if given."""

    size_bytes: SizeBytes | None = None
    reference: Reference | None = None
    snapshot: Uuid | None = None
    import_url: Reference | None = None
    format: Literal["raw", "qcow2"] | None = None
    compression: Compression | None = None
    sha256: Annotated[str, Field(max_length=64)] | None = None
    sha512: Annotated[str, Field(max_length=128)] | None = None
    tag: Tag = ""
    visibility: Visibility = "private"
    kind: DiskKind = "data"
    volatile: bool = False


class DiskChange(RequestModel):
    """`PATCH /v1/disks/{uuid}`: a field that is absent or null stays as it is."""

    tag: Tag | None = None
    visibility: Visibility | None = None
    owner: UserName | None = None
    size_bytes: SizeBytes | None = None


class ShareChange(RequestModel):
    """`PUT /v1/disks/{uuid}/shares/{user}`."""

    access: Literal["read", "write"]


class SnapshotCreation(RequestModel):
    """`POST /v1/disks/{uuid}/snapshots`."""

    tag: Tag = ""


class DiskSaving(RequestModel):
    """`POST /v1/disks/{uuid}/save`: which snapshot, and what the metadata is to say."""

    snapshot: Uuid | None = None
    title: Text | None = None
    comment: Text | None = None
    os: Text | None = None
    os_version: Text | None = None
    os_arch: Text | None = None
    version: Text | None = None
    author: Text | None = None
    publisher: Text | None = None
    kind: Literal["machine", "disk"] = "machine"
    valid_days: Annotated[int, Field(ge=1, le=3660)] = SAVED_VALID_DAYS


class AttachmentCreation(RequestModel):
    """`POST /v1/disks/{uuid}/attachments`."""

    instance: InstanceId
    access: Access = "rw"
    initiator: InitiatorName | None = None
    lease_s: LeaseSeconds | None = None


class MigrationCreation(RequestModel):
    """`POST /v1/disks/{uuid}/attachments/{id}/migrate`."""

    instance: InstanceId
    initiator: InitiatorName | None = None
    timeout_s: Annotated[int, Field(ge=1, le=MIGRATION_S_MAX)] = MIGRATION_S


class LeaseRenewal(RequestModel):
    """`PUT …/lease`: as long as last time unless given."""

    lease_s: LeaseSeconds | None = None


class AccountCreation(RequestModel):
    """`POST /v1/accounts`."""

    name: UserName
    role: Role = "user"
    password: Password | None = None
    certificate_subject: Text | None = None
    quota_bytes: Quota | None = None
    quota_disks: Quota | None = None
    quota_attachments: Quota | None = None
    enabled: bool = True


class AccountChange(RequestModel):
    """`PATCH /v1/accounts/{name}`: what is absent stays, null takes away."""

    role: Role | None = None
    password: Password | None = None
    current_password: AnyPassword | None = None
    certificate_subject: Text | None = None
    quota_bytes: Quota | None = None
    quota_disks: Quota | None = None
    quota_attachments: Quota | None = None
    enabled: bool | None = None


class TokenCreation(RequestModel):
    """`POST /v1/accounts/{name}/tokens`."""

    description: Annotated[str, Field(max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")] = ""
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1, max_length=len(SCOPES))]
    expires_in_s: Annotated[int, Field(ge=60, le=TOKEN_S_MAX)] | None = None


class SessionCreation(RequestModel):
    """`POST /v1/session`."""

    name: Annotated[str, Field(max_length=64)]
    password: AnyPassword


class AuditPruning(RequestModel):
    """`POST /v1/audit/prune`."""

    before: Annotated[str, Field(max_length=40)]


class LaunchCreation(RequestModel):
    """`POST /v1/launches`."""

    reference: Reference
    instance: InstanceId
    size_bytes: SizeBytes | None = None
    disks: Annotated[tuple[Uuid, ...], Field(max_length=DISKS_MAX)] = ()
    readonly: Annotated[tuple[Reference, ...], Field(max_length=DISKS_MAX)] = ()
    initiator: InitiatorName | None = None
    provisional: bool = False
    lease_s: LeaseSeconds | None = None


class EvictionRequest(RequestModel):
    """`POST /v1/cache/evict`: an image, or a number of bytes, or neither: what is over the marks."""

    image: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] | None = None
    bytes: Annotated[int, Field(ge=1, le=2**62)] | None = None
    dry_run: bool = False


class ScrubRequest(RequestModel):
    """`POST /v1/cache/scrub`."""

    action: Literal["now", "pause", "resume"] = "now"


Model = TypeVar("Model", bound=RequestModel)


def check_user_name(text: str) -> None:
    """Raise `InvalidInput` (`parameter-invalid`) for what cannot be a user's name."""
    if not re.fullmatch(_USER_NAME, text):
        raise InvalidInput(
            "parameter-invalid",
            "A user's name has up to 64 letters, digits, dots, dashes and at signs.",
            field="user",
        )


def body_of(request: falcon.Request) -> bytes:
    """Return the bytes of a body, read once; raises `HttpProblem` 413 (`body-too-large`)."""
    known: bytes | None = getattr(request.context, "body", None)
    if known is not None:
        return known
    terminated = request.env.get("wsgi.input_terminated", False)  # then chunked bodies end too
    stream = request.stream if terminated else request.bounded_stream
    body: bytes = stream.read(BODY_BYTES_MAX + 1)
    if len(body) > BODY_BYTES_MAX:
        raise HttpProblem(413, "body-too-large", f"A body may have {BODY_BYTES_MAX} bytes at most.")
    request.context.body = body
    return body


def read_body(request: falcon.Request, model: type[Model]) -> Model:
    """Return the body as `model`.

    Raises `HttpProblem` 415 (`body-not-json`) and 413 (`body-too-large`), and `InvalidInput` with
    code `body-invalid`, `field-unknown`, `field-missing` or `field-invalid` naming the field.
    """
    media_type = (request.content_type or "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise HttpProblem(415, "body-not-json", "Send JSON with Content-Type: application/json.")
    try:
        return model.model_validate_json(body_of(request))
    except ValidationError as error:
        raise _explain(error) from None


def _explain(error: ValidationError) -> InvalidInput:
    first = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    match first["type"]:
        case "json_invalid" | "model_type":
            return InvalidInput("body-invalid", f"The body is not a JSON object: {first['msg']}.")
        case "extra_forbidden":
            return InvalidInput(
                "field-unknown", f"There is no field {field!r} here; remove it.", field=field
            )
        case "missing":
            return InvalidInput("field-missing", f"Give the field {field!r}.", field=field)
        case _:
            return InvalidInput("field-invalid", f"Field {field!r}: {first['msg']}.", field=field)
