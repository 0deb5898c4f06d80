"""Checking documents for their authors: every one of a file, with the fault that is found first.

Whether the endorser is trusted, and whether the entry is still in use, matters when launching; here
expiry, deprecation and unusual words are notes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from stratocache.cache import constraints, document, signature
from stratocache.cache.document import Document
from stratocache.cache.errors import NotVerified, StratocacheError
from stratocache.cache.metadata import DATE_FORMAT
from stratocache.cache.signature import LegacySha1


@dataclass(frozen=True)
class Rules:
    """Which signatures count."""

    legacy_sha1: LegacySha1 = "refuse"
    pinned: frozenset[str] = frozenset()
    """Fingerprints for which `allow-pinned` accepts SHA-1."""
    allow_unsigned: bool = False


@dataclass(frozen=True)
class Verdict:
    """What was found of one document."""

    document: str
    fault: StratocacheError | None = None
    notes: tuple[str, ...] = ()

    def line(self) -> str:
        """Return the verdict for people."""
        if self.fault is not None:
            return f"Invalid: {self.document}: {self.fault.message} [{self.fault.code}]"
        notes = f" (note: {'; '.join(self.notes)})" if self.notes else ""
        return f"Valid: {self.document}{notes}"

    def record(self) -> dict[str, Any]:
        """Return the verdict for programs."""
        fault = {} if self.fault is None else self.fault.to_record()
        valid = self.fault is None
        return {"document": self.document, "valid": valid, "notes": list(self.notes), **fault}


def validate_file(file: Path, rules: Rules, *, now: datetime) -> Iterator[Verdict]:
    """Judge each document of a file; what cannot be read at all is one faulty document."""
    try:
        documents = document.parse(document.read(file))
        if not documents:
            raise NotVerified("document-root", "The list has no entry.")
    except StratocacheError as error:
        yield Verdict(str(file), error)
        return
    for number, entry in enumerate(documents, 1):
        name = str(file) if len(documents) == 1 else f"{file} (entry {number})"
        try:
            yield Verdict(name, notes=tuple(_notes(entry, rules, now)))
        except StratocacheError as error:
            yield Verdict(name, error)


def _notes(entry: Document, rules: Rules, now: datetime) -> Iterator[str]:
    """Note what is unusual; raises the first fault, what is said before who signed it."""
    metadata = constraints.check(entry, allow_unendorsed=not entry.signatures)
    yield from metadata.notes
    if entry.signatures or not rules.allow_unsigned:
        signer = signature.verify(entry, legacy_sha1=rules.legacy_sha1, pinned=rules.pinned)
        assert metadata.endorsement is not None, "signed documents are checked to have one"
        signature.check_identity(signer, metadata.endorsement)
        if signer.legacy_sha1:
            yield "the signature rests on SHA-1"
    else:
        yield "not signed"
    if metadata.deprecated is not None:
        yield f"deprecated: {metadata.deprecated or 'no reason given'}"
    if metadata.valid_until is not None and metadata.valid_until <= now:
        yield f"expired on {metadata.valid_until:{DATE_FORMAT}}"
