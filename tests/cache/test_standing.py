"""What a catalogue says of an image that was fetched before."""

from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from support.documents import (
    EMAIL,
    NOW,
    digests_of,
    make_endorser,
    signed_document,
    unsigned_document,
)
from support.origins import Fault, OriginServer, Resource

from stratocache.cache.catalogue import Catalogues, Standing
from stratocache.cache.configuration import CatalogueSettings, Configuration, FetchSettings
from stratocache.cache.entry import Entry
from stratocache.cache.errors import OriginFailed
from stratocache.cache.identifier import encode

ID = encode(digests_of(b"an image")["SHA-1"])
DAY = timedelta(days=1)
JANE = make_endorser()
JOHN = make_endorser("john.doe@example.org", "John Doe")
OWN = f"/metadata/{ID}/{EMAIL}"
ALL = f"/metadata/{ID}"


def configuration(endpoint: str, **settings: Any) -> Configuration:
    """Return a configuration that trusts Jane and John."""
    settings.setdefault("trusted_fingerprints", (JANE.fingerprint, JOHN.fingerprint))
    return Configuration(
        catalogues={"stratuslab": CatalogueSettings(endpoint=endpoint, **settings)},
        fetch=FetchSettings(connect_timeout_s=2, read_timeout_s=2),
    )


def ask(settings: Configuration, entry: Entry, now: datetime = NOW) -> Standing:
    """Return the standing of an entry."""

    async def main() -> Standing:
        async with httpx.AsyncClient() as client:
            return await Catalogues(settings, client).standing(entry, now=now)

    return trio.run(main)


@pytest.fixture
def stored(origin: OriginServer) -> Iterator[Entry]:
    """Jane's entry, as it was resolved; the server lists it."""
    origin.add(ALL, signed_document(JANE))

    async def main() -> Entry:
        async with httpx.AsyncClient() as client:
            return await Catalogues(configuration(origin.url), client).resolve(ID, now=NOW)

    yield trio.run(main)


def said(origin: OriginServer, entry: Entry, now: datetime = NOW, **settings: Any) -> str:
    """Return the verdict of the server's catalogue."""
    return ask(configuration(origin.url, **settings), entry, now).verdict


def test_listed_entries_are_current(origin: OriginServer, stored: Entry) -> None:
    """An entry is current when its endorser's own list has it, or only that of all endorsers."""
    assert ask(configuration(origin.url), stored) == Standing("current")
    origin.add(OWN, origin.resources.pop(ALL))
    assert ask(configuration(origin.url), stored) == Standing("current")


def test_a_new_endorsement_takes_the_place_of_the_old(origin: OriginServer, stored: Entry) -> None:
    """The newest acceptable word of an endorser is what counts from now on."""
    origin.add(OWN, signed_document(JANE, created=NOW))
    standing = ask(configuration(origin.url), stored)
    assert standing.verdict == "current"
    assert standing.entry is not None and standing.entry.endorsed_at == NOW


def test_deprecation_takes_an_entry_back(origin: OriginServer, stored: Entry) -> None:
    """A deprecation that the endorser signed speaks for itself, wherever it is listed."""
    gone = signed_document(JANE, unsigned_document(deprecated="root has no password"), created=NOW)
    for path in (f"{OWN}?status=all", ALL):
        origin.resources.clear()
        origin.add(path, gone)
        standing = ask(configuration(origin.url), stored)
        assert standing.verdict == "taken-back"
        assert "root has no password" in standing.reason


def test_an_older_deprecation_is_no_news(origin: OriginServer, stored: Entry) -> None:
    """A replica that lags behind cannot take back what was endorsed since."""
    origin.resources.clear()
    old = signed_document(JANE, unsigned_document(deprecated="x"), created=NOW - 9 * DAY)
    origin.add(f"{OWN}?status=all", old)
    assert said(origin, stored) == "unknown"


def test_another_endorser_may_stand_in(origin: OriginServer, stored: Entry) -> None:
    """What Jane takes back John may still endorse, but not as another image, and only if trusted."""
    gone = signed_document(JANE, unsigned_document(deprecated="x"), created=NOW)
    origin.add(f"{OWN}?status=all", gone)
    origin.add(ALL, signed_document(JOHN))
    standing = ask(configuration(origin.url), stored)
    assert standing.verdict == "current"
    assert standing.entry is not None and standing.entry.endorser.email == "john.doe@example.org"
    assert said(origin, stored, trusted_fingerprints=(JANE.fingerprint,)) == "taken-back"
    forged = unsigned_document(digests={"SHA-256": "0" * 64, "SHA-512": "0" * 128})
    origin.add(ALL, signed_document(JOHN, forged))
    assert said(origin, stored) == "taken-back"


def test_expired_entries_are_listed(origin: OriginServer, stored: Entry) -> None:
    """The default list hides what has expired; that is no withdrawal."""
    origin.resources.clear()
    expired = signed_document(JANE, unsigned_document(valid_until=NOW + DAY))
    origin.add(f"{OWN}?status=all", expired)
    assert said(origin, stored, NOW + 2 * DAY) == "unknown"


def test_what_is_nowhere_is_unlisted(origin: OriginServer, stored: Entry) -> None:
    """An endorser of whom the catalogue has nothing does not stand by the image any more."""
    origin.resources.clear()
    assert said(origin, stored) == "unlisted"
    origin.add(ALL, signed_document(make_endorser("eve@example.org", "Eve")))
    assert said(origin, stored) == "unlisted"


@pytest.mark.parametrize("body", [b"<html><body>Sign in</body></html>", b"Not Found", b"<a/>"])
def test_nonsense_says_nothing(origin: OriginServer, stored: Entry, body: bytes) -> None:
    """A portal's page or another document in place of the catalogue is no withdrawal."""
    origin.resources.clear()
    for path in (OWN, ALL):
        origin.add(path, body)
    assert said(origin, stored) == "unknown"


def test_forged_and_refused_entries_say_nothing(origin: OriginServer, stored: Entry) -> None:
    """An entry whose signature is broken or that site policy refuses is there all the same."""
    good = signed_document(JANE, created=NOW)
    origin.resources.clear()
    origin.add(OWN, good.replace(b"<slterms:kind>machine", b"<slterms:kind>network"))
    assert said(origin, stored) == "unknown"
    origin.add(OWN, good)
    assert said(origin, stored, trusted_fingerprints=("00" * 32,)) == "unknown"


@pytest.mark.parametrize("status", [301, 403, 429, 500, 503])
def test_failing_servers_say_nothing(origin: OriginServer, stored: Entry, status: int) -> None:
    """A catalogue that cannot answer either question is unreachable, not silent."""
    origin.resources.clear()
    origin.add(f"{OWN}?status=all", Resource(b"", accidents=()))
    origin.resources[f"{OWN}?status=all"].faults.extend([Fault(status=status)] * 3)
    with pytest.raises(OriginFailed) as caught:
        said(origin, stored)
    assert caught.value.code == "catalogue-unreachable"


def test_folders_are_asked_likewise(tmp_path: Path, stored: Entry) -> None:
    """Of a folder a missing file is an answer; a missing folder is none."""
    folder = tmp_path / "entries"
    settings = configuration(folder.as_uri())
    with pytest.raises(OriginFailed):
        ask(settings, stored)
    folder.mkdir()
    assert ask(settings, stored).verdict == "unlisted"
    (folder / "a.xml").write_bytes(signed_document(JANE))
    assert ask(settings, stored).verdict == "current"
    gone = signed_document(JANE, unsigned_document(deprecated="x"), created=NOW)
    (folder / "b.xml").write_bytes(gone)
    assert ask(settings, stored).verdict == "taken-back"
