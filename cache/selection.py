"""What a StratusLab path asks for: `identifier[/email[/created]]`, as in `/metadata/…` URLs."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime

from stratocache.cache import identifier as identifiers
from stratocache.cache.errors import InvalidInput
from stratocache.cache.metadata import DATE_FORMAT, Endorsement

_EMAIL = re.compile(r"[A-Za-z0-9._%+-]+@[A-Za-z0-9.-]+")
_DATE = re.compile(r"[0-9]{4}-?[0-9]{2}-?[0-9]{2}T[0-9]{2}:?[0-9]{2}:?[0-9]{2}Z")


@dataclass(frozen=True)
class Selection:
    """The address of an image's entries; absent parts select all."""

    identifier: str
    email: str | None = None
    created: datetime | None = None

    @classmethod
    def parse(cls, path: str) -> "Selection":
        """Read a path; raises `InvalidInput` with code `reference-invalid`.

        The date may be written without its dashes and colons.
        """
        identifier, *rest = path.split("/")
        if not identifiers.is_identifier(identifier):
            raise _invalid(path, "it must begin with a 27-character image identifier")
        if len(rest) > 2 or (rest and not _EMAIL.fullmatch(rest[0])):
            raise _invalid(path, "the endorser's e-mail address follows the identifier")
        return cls(
            identifier,
            rest[0] if rest else None,
            _date(rest[1]) if len(rest) > 1 else None,
        )

    @property
    def segments(self) -> list[str]:
        """The parts as the original URLs write them."""
        created = None if self.created is None else self.created.strftime(DATE_FORMAT)
        return [part for part in (self.identifier, self.email, created) if part is not None]

    def includes(self, identifier: str, endorsement: Endorsement | None) -> bool:
        """Tell whether an entry is meant; who endorses is open before it is signed."""
        if endorsement is None:
            return identifier == self.identifier
        return (
            identifier == self.identifier
            and self.email in (None, endorsement.email)
            and self.created in (None, endorsement.created)
        )


def _date(text: str) -> datetime:
    digits = text.replace("-", "").replace(":", "")
    try:
        if _DATE.fullmatch(text):
            return datetime.strptime(digits, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    except ValueError:
        pass
    raise _invalid(text, "the date of an endorsement is written YYYY-MM-DDThh:mm:ssZ")


def _invalid(path: str, reason: str) -> InvalidInput:
    return InvalidInput(
        "reference-invalid", f"{path!r} does not name an entry: {reason}.", field="reference"
    )
