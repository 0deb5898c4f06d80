"""From a reference to the one entry that this site uses for it.

Every document of a catalogue's answer is judged by itself. Of those that pass, each endorser's newest
endorsement speaks for that endorser (so a deprecation hides what was said before), and the first of
the preferred endorsers wins, then the newest. When nothing passes, the reason of the document that
came furthest is the error.
"""

import logging
from datetime import datetime

import httpx
import trio

from stratocache.cache import acceptance, constraints, distinguished_name, document, reference
from stratocache.cache.acceptance import Endorsed
from stratocache.cache.catalogue_answers import Answer, read_answers
from stratocache.cache.configuration import CatalogueSettings, Configuration
from stratocache.cache.document import Document
from stratocache.cache.entry import Entry
from stratocache.cache.errors import NotFound, StratocacheError
from stratocache.cache.reference import Reference
from stratocache.cache.selection import Selection

log = logging.getLogger(__name__)

_READ, _JUDGED, _DESCRIBED = range(3)


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
        catalogues = self._configuration.catalogues
        endpoints = {name: settings.endpoint for name, settings in catalogues.items()}
        wanted = reference.parse(text, self._configuration.default_catalogue, endpoints)
        selection = Selection.parse(wanted.path)
        settings = self._settings(wanted.catalogue)
        answers = await read_answers(
            settings.endpoint, selection, self._client, self._configuration.fetch
        )
        choice = _Choice(wanted, selection, settings, now)
        return await trio.to_thread.run_sync(choice.make, answers)

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

    def _documents(self, answer: Answer) -> list[Document]:
        try:
            return document.parse(answer.data)
        except StratocacheError as error:
            self._reject(_READ, answer.source, error)
            return []

    def _judge(self, candidate: Document, source: str) -> Endorsed | None:
        try:
            claimed = constraints.check(candidate, allow_unendorsed=True)
            if not self._selection.includes(claimed.identifier, claimed.endorsement):
                return None
            return acceptance.judge(
                candidate, catalogue=self._wanted.catalogue, settings=self._settings, source=source
            )
        except StratocacheError as error:
            self._reject(_JUDGED, source, error)
            return None

    def _describe(self, candidate: Endorsed) -> Entry | None:
        try:
            entry = acceptance.describe(candidate, endpoint=self._settings.endpoint, now=self._now)
            acceptance.check_pin(entry, self._wanted.pin)
        except StratocacheError as error:
            self._reject(_DESCRIBED, candidate.source, error)
            return None
        return entry

    def _reject(self, stage: int, source: str, error: StratocacheError) -> None:
        log.info("%s is not used: %s: %s", source, error.code, error.message)
        self._faults.append((stage, error))

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
