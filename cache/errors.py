"""The errors users meet: a stable code, one sentence that says what to do, and two statuses.

    StratocacheError
     ├── InvalidInput     exit 2   HTTP 400   the request itself is wrong
     ├── NotFound         exit 3   HTTP 404   nothing of that name
     ├── Conflict         exit 4   HTTP 409   true, but not now: in use, exists, wrong state
     ├── Refused          exit 5   HTTP 403   site policy, trust or validity says no
     ├── NotVerified      exit 6   HTTP 422   the bytes or the signature are not what was promised
     ├── NoSpace          exit 7   HTTP 507   the file system or a limit is full
     ├── OriginFailed     exit 1   HTTP 502   a server we depend on failed; trying again may help
     ├── Cancelled        exit 1   HTTP 409   somebody asked us to stop
     ├── Unreachable      exit 10  HTTP 503   the daemon, or a part of it, does not answer
     └── Internal         exit 1   HTTP 500   our bug

Exit statuses are part of the command line's contract (DESIGN.md section 8). An error crosses process
borders as a JSON record (`to_record`, `from_record`), so that the sentence a fetch failed with in
`blockd` is the one its user reads.
"""

from typing import ClassVar, TypedDict


class ErrorRecord(TypedDict, total=False):
    """What is stored and sent of an error; `field` only when one input field is to blame."""

    category: str
    code: str
    message: str
    field: str


class StratocacheError(Exception):
    """Base of every error that is shown to a user.

    `code` is stable, lower-case and dashed ("digest-mismatch"); `message` is a sentence for people;
    `field` names the offending input field, when one is to blame.
    """

    exit_status: ClassVar[int] = 1
    http_status: ClassVar[int] = 500

    def __init__(self, code: str, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.field = field

    def to_record(self) -> ErrorRecord:
        """Return the JSON-ready form of this error."""
        record = ErrorRecord(category=type(self).__name__, code=self.code, message=self.message)
        if self.field is not None:
            record["field"] = self.field
        return record


class InvalidInput(StratocacheError):
    """The request itself is wrong: syntax, limits, unknown fields."""

    exit_status = 2
    http_status = 400


class NotFound(StratocacheError):
    """Nothing of that name exists, here or at the origin."""

    exit_status = 3
    http_status = 404


class Conflict(StratocacheError):
    """The request is right but the present state forbids it: in use, exists, not ready."""

    exit_status = 4
    http_status = 409


class Refused(StratocacheError):
    """Site policy, trust or validity says no."""

    exit_status = 5
    http_status = 403


class NotVerified(StratocacheError):
    """Bytes, sizes, signatures or documents are not what was promised."""

    exit_status = 6
    http_status = 422


class NoSpace(StratocacheError):
    """A file system or a configured limit is full."""

    exit_status = 7
    http_status = 507


class OriginFailed(StratocacheError):
    """A server that we depend on failed in a way that may pass."""

    http_status = 502


class Cancelled(StratocacheError):
    """Somebody asked for this work to stop."""

    http_status = 409


class Unreachable(StratocacheError):
    """The daemon, or one of its parts, does not answer."""

    exit_status = 10
    http_status = 503


class Internal(StratocacheError):
    """A bug of ours; the log of the process has the traceback."""


_CATEGORIES: dict[str, type[StratocacheError]] = {
    category.__name__: category
    for category in (
        InvalidInput, NotFound, Conflict, Refused, NotVerified,
        NoSpace, OriginFailed, Cancelled, Unreachable, Internal,
    )
}  # fmt: skip


def from_record(record: ErrorRecord) -> StratocacheError:
    """Rebuild the error that `to_record` described; an unknown category becomes `Internal`."""
    category = _CATEGORIES.get(record.get("category", ""), Internal)
    return category(
        record.get("code", "internal"), record.get("message", ""), field=record.get("field")
    )
