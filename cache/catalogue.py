"""From a reference to the one entry that this site uses for it.

Every document of a catalogue's answer is judged by itself. Of those that pass, each endorser's newest
endorsement speaks for that endorser (so a deprecation hides what was said before), and the first of
the preferred endorsers wins, then the newest. When nothing passes, the reason of the document that
came furthest is the error.

Of an image that was fetched, `standing` says whether its catalogue still has the entry. Only two
answers speak against it: a deprecation that its endorser signed, and that the catalogue, well able
to answer, lists nothing of that endorser. Whatever else goes wrong says nothing.
"""

import logging
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import httpx
import trio

from stratocache.cache import acceptance, constraints, distinguished_name, document, reference
from stratocache.cache.acceptance import Endorsed
from stratocache.cache.catalogue_answers import Answer, read_answers
from stratocache.cache.configuration import CatalogueSettings, Configuration
from stratocache.cache.document import Document
from stratocache.cache.entry import Entry, same_content
from stratocache.cache.errors import NotFound, StratocacheError
from stratocache.cache.metadata import Endorsement
from stratocache.cache.reference import Reference
from stratocache.cache.selection import Selection

log = logging.getLogger(__name__)

_READ, _JUDGED, _DESCRIBED = range(3)
_STRENGTHS = ("current", "taken-back", "unknown", "unlisted")
"""Of two answers the first in this order counts."""


@dataclass(frozen=True)
class Candidate:
    """One document of a catalogue's answer, and what speaks against it."""

    source: str
    """The URL or path that it was read from."""
    endorser: str | None
    """The e-mail address that it claims; None when it cannot be read."""
    endorsed_at: datetime | None
    code: str | None
    """Of the error against it; None = it may be used."""
    message: str | None


@dataclass(frozen=True)
class Explanation:
    """What a reference stands for, or why it stands for nothing that this site uses."""

    entry: Entry | None
    error: StratocacheError | None
    candidates: tuple[Candidate, ...] = ()


@dataclass(frozen=True)
class Standing:
    """What a catalogue says today of an image that was fetched by one of its entries."""

    verdict: Literal["current", "unlisted", "taken-back", "unknown"]
    """`taken-back` is signed; `unlisted` is what a broken server may say, too."""
    entry: Entry | None = None
    """When current, what may be used from now on instead of the stored entry, if there is such."""
    reason: str = ""
    """What else it says, a sentence."""


class Catalogues:
    """The configured catalogues; `client` serves those behind HTTP and stays the caller's."""

    def __init__(self, configuration: Configuration, client: httpx.AsyncClient) -> None:
        self._configuration = configuration
        self._client = client

    async def resolve(self, text: str, *, now: datetime) -> Entry:
        """Return the entry that a reference stands for at the time `now`.

        Raises `InvalidInput` (`reference-invalid`), `NotFound` (`catalogue-unknown`,
        `reference-unknown`), `OriginFailed` (`catalogue-unreachable`), or what `document.parse`,
        `acceptance.judge`, `acceptance.describe` and `acceptance.check_pin` raise.
        """
        choice, answers = await self._ask(text, now)
        return await trio.to_thread.run_sync(choice.make, answers)

    async def explain(self, text: str, *, now: datetime) -> Explanation:
        """Do as `resolve`, and tell of every document what was decided; raises nothing of that."""
        try:
            choice, answers = await self._ask(text, now)
        except StratocacheError as error:
            return Explanation(None, error)
        return await trio.to_thread.run_sync(choice.explain, answers)

    async def _ask(self, text: str, now: datetime) -> "tuple[_Choice, list[Answer]]":
        catalogues = self._configuration.catalogues
        endpoints = {name: settings.endpoint for name, settings in catalogues.items()}
        wanted = reference.parse(text, self._configuration.default_catalogue, endpoints)
        selection = Selection.parse(wanted.path)
        settings = self._settings(wanted.catalogue)
        answers = await read_answers(
            settings.endpoint, selection, self._client, self._configuration.fetch
        )
        return _Choice(wanted, selection, settings, now), answers

    async def standing(self, entry: Entry, *, now: datetime) -> Standing:
        """Ask the catalogue of a stored entry what it says of it at the time `now`.

        Its own endorser is asked about first; when that one does not stand by the image any more,
        any other that the site accepts may. Raises `OriginFailed` (`catalogue-unreachable`) and
        `NotFound` (`catalogue-unknown`).
        """
        own = await self._standing(entry, entry.endorser.email, now)
        if own.verdict == "current":
            return own
        all_of_it = await self._standing(entry, None, now)
        return min(own, all_of_it, key=lambda standing: _STRENGTHS.index(standing.verdict))

    async def _standing(self, entry: Entry, email: str | None, now: datetime) -> Standing:
        settings = self._settings(entry.catalogue)
        selection = Selection(entry.identifier, email)
        answers = await read_answers(
            settings.endpoint, selection, self._client, self._configuration.fetch, certain=True
        )
        path = "/".join(selection.segments)
        choice = _Choice(Reference(entry.catalogue, path), selection, settings, now)
        return await trio.to_thread.run_sync(choice.standing, entry, answers)

    def recheck(self, entry: Entry, *, now: datetime) -> None:
        """Judge a stored entry by today's configuration and clock; see `acceptance.recheck`.

        Raises `NotFound` with code `catalogue-unknown` when its catalogue is no longer configured.
        """
        acceptance.recheck(entry, self._settings(entry.catalogue), now=now)

    def _settings(self, catalogue: str) -> CatalogueSettings:
        settings = self._configuration.catalogues.get(catalogue)
        if settings is None:
            raise NotFound(
                "catalogue-unknown",
                f"The catalogue {catalogue!r} is not configured; add [catalogues.{catalogue}].",
            )
        return settings


class _Choice:
    """One decision among the documents of one answer, and the reasons against the others."""

    def __init__(
        self, wanted: Reference, selection: Selection, settings: CatalogueSettings, now: datetime
    ) -> None:
        self._wanted = wanted
        self._selection = selection
        self._settings = settings
        self._now = now
        self._faults: list[tuple[int, StratocacheError]] = []
        self._candidates: list[Candidate] = []
        self._legible = True
        self._claimants: set[str] = set()
        self._deprecations: dict[str, tuple[datetime, str]] = {}
        """By endorsers' e-mail addresses, when they took the image back, and why."""

    def make(self, answers: list[Answer]) -> Entry:
        """Return the entry to use; raises the most telling reason when there is none."""
        endorsed = [
            judged
            for answer in answers
            for candidate in self._documents(answer)
            if (judged := self._judge(candidate, answer.source)) is not None
        ]
        entries = [
            entry
            for candidate in _newest_of_each(endorsed)
            if (entry := self._describe(candidate)) is not None
        ]
        if entries:
            return min(entries, key=self._rank)
        if self._faults:
            raise max(self._faults, key=lambda fault: fault[0])[1]
        raise NotFound(
            "reference-unknown",
            f"The catalogue {self._wanted.catalogue} has no entry {self._wanted.path}; "
            "check the identifier, or search its web pages.",
            field="reference",
        )

    def explain(self, answers: list[Answer]) -> Explanation:
        """Return the entry to use or the reason that there is none, and what was decided."""
        try:
            return Explanation(self.make(answers), None, tuple(self._candidates))
        except StratocacheError as error:
            return Explanation(None, error, tuple(self._candidates))

    def standing(self, entry: Entry, answers: list[Answer]) -> Standing:
        """Return what the answers say of a stored entry."""
        try:
            found = self.make(answers)
        except StratocacheError as error:
            email = entry.endorser.email.lower()
            taken_back_at, reason = self._deprecations.get(email, (None, ""))
            if taken_back_at is not None and taken_back_at >= entry.endorsed_at:
                return Standing("taken-back", reason=reason)
            unlisted = self._legible and email not in self._claimants
            return Standing("unlisted" if unlisted else "unknown", reason=error.message)
        if not same_content(entry, found):
            return Standing(
                "unknown", reason=f"{found.source} describes another image by this name."
            )
        same = found.model_copy(update={"source": entry.source}) == entry
        return Standing("current", None if same else found)

    def _documents(self, answer: Answer) -> list[Document]:
        try:
            return document.parse(answer.data)
        except StratocacheError as error:
            self._reject(_READ, answer.source, error, None)
            self._legible = False
            return []

    def _judge(self, candidate: Document, source: str) -> Endorsed | None:
        try:
            claimed = constraints.check(candidate, allow_unendorsed=True)
        except StratocacheError as error:
            self._reject(_JUDGED, source, error, None)
            self._legible = False
            return None
        try:
            if not self._selection.includes(claimed.identifier, claimed.endorsement):
                return None
            if claimed.endorsement is not None:
                self._claimants.add(claimed.endorsement.email.lower())
            return acceptance.judge(
                candidate, catalogue=self._wanted.catalogue, settings=self._settings, source=source
            )
        except StratocacheError as error:
            self._reject(_JUDGED, source, error, claimed.endorsement)
            return None

    def _describe(self, candidate: Endorsed) -> Entry | None:
        try:
            entry = acceptance.describe(candidate, endpoint=self._settings.endpoint, now=self._now)
            acceptance.check_pin(entry, self._wanted.pin)
        except StratocacheError as error:
            if error.code == "entry-deprecated":
                said = (candidate.endorsement.created, error.message)
                self._deprecations[candidate.endorsement.email.lower()] = said
            self._reject(_DESCRIBED, candidate.source, error, candidate.endorsement)
            return None
        self._note(candidate.source, candidate.endorsement, None)
        return entry

    def _reject(
        self, stage: int, source: str, error: StratocacheError, endorsement: Endorsement | None
    ) -> None:
        log.info("%s is not used: %s: %s", source, error.code, error.message)
        self._faults.append((stage, error))
        self._note(source, endorsement, error)

    def _note(
        self, source: str, endorsement: Endorsement | None, error: StratocacheError | None
    ) -> None:
        self._candidates.append(
            Candidate(
                source=source,
                endorser=endorsement.email if endorsement else None,
                endorsed_at=endorsement.created if endorsement else None,
                code=error.code if error else None,
                message=error.message if error else None,
            )
        )

    def _rank(self, entry: Entry) -> tuple[int, float, str]:
        """Sort the preferred endorsers first, then the newest; the last part breaks ties."""
        preferred = [email.lower() for email in self._settings.preferred_endorsers]
        email = entry.endorser.email.lower()
        place = preferred.index(email) if email in preferred else len(preferred)
        return place, -entry.endorsed_at.timestamp(), entry.endorser.fingerprint_sha256


def _newest_of_each(endorsed: list[Endorsed]) -> list[Endorsed]:
    """Keep each endorser's last word; of two in the same second, the deprecating one."""
    newest: dict[tuple[str, distinguished_name.Names], Endorsed] = {}
    for candidate in sorted(
        endorsed, key=lambda e: (e.endorsement.created, e.metadata.deprecated is not None)
    ):
        # Without an alternative name in the certificate the address alone proves nothing.
        subject = distinguished_name.of_certificate(candidate.signer.certificate.subject)
        newest[candidate.endorsement.email.lower(), subject] = candidate
    return list(newest.values())
