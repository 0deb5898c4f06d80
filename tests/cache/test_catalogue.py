"""References resolved against folders and real HTTP servers."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from support.documents import (
    EMAIL,
    FAR,
    NOW,
    Endorser,
    digests_of,
    make_endorser,
    shelve,
    signed_document,
    unsigned_document,
)
from support.origins import Fault, OriginServer, Resource

from stratocache.cache.catalogue import Catalogues
from stratocache.cache.configuration import CatalogueSettings, Configuration, FetchSettings
from stratocache.cache.document import MAX_BYTES
from stratocache.cache.entry import Entry
from stratocache.cache.errors import NotFound, OriginFailed, Refused, StratocacheError
from stratocache.cache.identifier import encode

FIXTURES = Path(__file__).resolve().parents[2] / "../shared/fixtures/marketplace"
IMAGE = b"an image"
ID = encode(digests_of(IMAGE)["SHA-1"])
DAY = timedelta(days=1)
JANE = make_endorser()
JOHN = make_endorser("john.doe@example.org", "John Doe")
PINNED = (JANE.fingerprint, JOHN.fingerprint)


def configuration(endpoint: str, **settings: Any) -> Configuration:
    settings.setdefault("trusted_fingerprints", PINNED)
    return Configuration(
        catalogues={"stratuslab": CatalogueSettings(endpoint=endpoint, **settings)},
        fetch=FetchSettings(connect_timeout_s=2, read_timeout_s=2),
    )


def resolve(settings: Configuration, text: str = ID, now: datetime = NOW) -> Entry:
    async def ask() -> Entry:
        async with httpx.AsyncClient() as client:
            return await Catalogues(settings, client).resolve(text, now=now)

    return trio.run(ask)


def refusal(settings: Configuration, text: str = ID, now: datetime = NOW) -> str:
    with pytest.raises(StratocacheError) as caught:
        resolve(settings, text, now)
    return caught.value.code


def recheck(settings: Configuration, entry: Entry, now: datetime = NOW) -> None:
    Catalogues(settings, httpx.AsyncClient()).recheck(entry, now=now)


def recheck_refusal(settings: Configuration, entry: Entry, now: datetime = NOW) -> str:
    with pytest.raises(StratocacheError) as caught:
        recheck(settings, entry, now)
    return caught.value.code


@dataclass
class Folder:
    """A catalogue in a folder."""

    path: Path

    def put(self, document: bytes, name: str = "entry.xml") -> None:
        (self.path / name).write_bytes(document)

    def configuration(self, **settings: Any) -> Configuration:
        return configuration(self.path.as_uri(), **settings)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """An empty folder of entries."""
    path = tmp_path / "entries"
    path.mkdir()
    return Folder(path)


@pytest.fixture
def server(origin: OriginServer) -> Iterator[OriginServer]:
    """A server with one good entry."""
    body = signed_document(JANE).partition(b"?>")[2]
    origin.add(f"/metadata/{ID}", b"<metadata>" + body + b"</metadata>")
    yield origin


def test_entry(folder: Folder) -> None:
    """What the document says, and who said it, becomes the entry."""
    created = NOW - 2 * DAY
    folder.put(signed_document(JANE, created=created))

    entry = resolve(folder.configuration())

    assert entry.identifier == ID
    assert entry.catalogue == "stratuslab"
    assert entry.size_bytes == len(IMAGE)
    assert entry.digests == {
        name.lower().replace("-", ""): text for name, text in digests_of(IMAGE).items()
    }
    assert entry.locations == ("http://127.0.0.1:9/image",)
    assert entry.endorser.email == EMAIL
    assert entry.endorser.fingerprint_sha256 == JANE.fingerprint
    assert entry.endorsed_at == created
    assert entry.trust == "signed"
    assert entry.valid_until == FAR
    assert (entry.compression, entry.format, entry.kind) == ("none", "raw", "machine")
    assert entry.source == str(folder.path / "entry.xml")
    recheck(folder.configuration(), entry)


def test_nested_folder(folder: Folder) -> None:
    """Entries may lie as the original server stored them."""
    created = NOW - DAY
    shelve(folder.path, signed_document(JANE, created=created), ID, EMAIL, created)

    assert resolve(folder.configuration()).endorsed_at == created
    assert resolve(folder.configuration(), f"{ID}/{EMAIL}").endorsed_at == created
    assert refusal(folder.configuration(), f"{ID}/nobody@example.org") == "reference-unknown"


def test_http_list(server: OriginServer) -> None:
    """A list answer is unwrapped; the entry tells where it came from."""
    settings = configuration(server.url)

    entry = resolve(settings)

    assert entry.source == f"{server.url}/metadata/{ID}"
    assert resolve(settings, f"{server.url}/metadata/{ID}") == entry


def test_http_single_entry(origin: OriginServer) -> None:
    """The full address asks for exactly that URL, whatever the date's form."""
    created = datetime(2026, 11, 20, 1, 2, 3, tzinfo=UTC)
    origin.add(
        f"/sub/metadata/{ID}/{EMAIL}/2026-11-20T01:02:03Z", signed_document(JANE, created=created)
    )
    settings = configuration(f"{origin.url}/sub/")

    for date in ("2026-11-20T01:02:03Z", "20261120T010203Z"):
        assert resolve(settings, f"{ID}/{EMAIL}/{date}").endorsed_at == created


def test_answer_for_another_reference(origin: OriginServer) -> None:
    """A server that answers with some other entry is not believed."""
    origin.add(f"/metadata/{'A' * 27}", signed_document(JANE))
    origin.add(f"/metadata/{ID}/{EMAIL}/2020-01-01T00:00:00Z", signed_document(JANE))
    settings = configuration(origin.url)

    assert refusal(settings, "A" * 27) == "reference-unknown"
    assert refusal(settings, f"{ID}/{EMAIL}/2020-01-01T00:00:00Z") == "reference-unknown"


@pytest.mark.parametrize("text", ["x", ID[:-1], f"{ID}/noemail", f"{ID}/a@b.c/yesterday",
                                  f"{ID}/a@b.c/2026-11-20T01:02:03Z/x", "tag/a@b.c/x",
                                  f"{ID}/a@b.c/2026-13-20T01:02:03Z"])  # fmt: skip
def test_path_that_names_no_entry(folder: Folder, text: str) -> None:
    """Paths other than identifier, address, date are refused before anything is asked."""
    assert refusal(folder.configuration(), text) == "reference-invalid"


def test_unknown(folder: Folder, origin: OriginServer) -> None:
    """An image that the catalogue does not have is not found, whichever way it says so."""
    assert refusal(folder.configuration()) == "reference-unknown"
    assert refusal(configuration(origin.url)) == "reference-unknown"
    origin.add(f"/metadata/{ID}", b"<metadata></metadata>")
    assert refusal(configuration(origin.url)) == "reference-unknown"
    with pytest.raises(NotFound):
        resolve(configuration(origin.url), f"nowhere:{ID}")


def test_unreachable(tmp_path: Path, origin: OriginServer) -> None:
    """A catalogue that is down or broken is told apart from one that does not know."""
    assert refusal(configuration("http://127.0.0.1:9")) == "catalogue-unreachable"
    assert refusal(configuration((tmp_path / "none").as_uri())) == "catalogue-unreachable"
    for fault in (Fault(status=500), Fault(status=403), Fault(cut_after_bytes=5)):
        origin.add(f"/metadata/{ID}", Resource(signed_document(JANE)))
        origin.resources[f"/metadata/{ID}"].faults.append(fault)
        with pytest.raises(OriginFailed):
            resolve(configuration(origin.url))


def test_endless_redirect(origin: OriginServer) -> None:
    """A redirect is followed, a circle of them is not."""
    target = origin.add("/elsewhere", signed_document(JANE))
    path = f"/metadata/{ID}"
    origin.add(path, b"")
    origin.resources[path].faults.append(Fault(status=302, headers={"Location": target}))
    assert resolve(configuration(origin.url)).source == target

    circle = Fault(status=302, headers={"Location": origin.url + path})
    origin.resources[path].faults.extend([circle] * 20)
    assert refusal(configuration(origin.url)) == "catalogue-unreachable"


def test_slow_answer(origin: OriginServer) -> None:
    """A server that stops in the middle is given up after the configured time."""
    held = Fault(cut_after_bytes=100, hold=threading.Event())
    origin.add(f"/metadata/{ID}", Resource(signed_document(JANE)))
    origin.resources[f"/metadata/{ID}"].faults.append(held)
    limits = FetchSettings(connect_timeout_s=0.2, read_timeout_s=0.2)
    settings = configuration(origin.url).model_copy(update={"fetch": limits})

    try:
        assert refusal(settings) == "catalogue-unreachable"
    finally:
        assert held.hold is not None
        held.hold.set()


def test_large_answer(origin: OriginServer) -> None:
    """An answer beyond the limit is cut off and refused."""
    origin.add(f"/metadata/{ID}", b"<metadata>" + b" " * 4 * MAX_BYTES)
    assert refusal(configuration(origin.url)) == "document-too-large"


def test_compressed_answer(origin: OriginServer) -> None:
    """An answer that claims to be compressed, unasked, is refused unread."""
    path = f"/metadata/{ID}"
    origin.add(path, signed_document(JANE))
    origin.resources[path].faults.append(Fault(headers={"Content-Encoding": "gzip"}))
    assert refusal(configuration(origin.url)) == "catalogue-unreachable"


def test_reason_behind_an_empty_list(origin: OriginServer) -> None:
    """When the default list hides an entry, the complete one is asked for the reason."""
    expired = unsigned_document(valid_until=NOW - DAY)
    origin.add(f"/metadata/{ID}", b"<metadata/>")
    origin.add(f"/metadata/{ID}?status=all", signed_document(JANE, expired))
    assert refusal(configuration(origin.url)) == "entry-expired"


# Trust


def test_untrusted(folder: Folder) -> None:
    """An unknown certificate is refused with its fingerprint and the key to add it to."""
    folder.put(signed_document(JANE))
    with pytest.raises(Refused) as caught:
        resolve(folder.configuration(trusted_fingerprints=()))
    assert caught.value.code == "endorser-untrusted"
    assert JANE.fingerprint in caught.value.message
    assert "catalogues.stratuslab.trusted_fingerprints" in caught.value.message


def test_fingerprint_spelling(folder: Folder) -> None:
    """Fingerprints may be given as other programs print them."""
    folder.put(signed_document(JANE))
    digits = JANE.fingerprint.upper()
    colons = ":".join(digits[i : i + 2] for i in range(0, 64, 2))
    assert resolve(folder.configuration(trusted_fingerprints=(colons,)))


@pytest.fixture
def authority(tmp_path: Path) -> tuple[Endorser, Path]:
    """An authority and the file that names it."""
    endorser = make_endorser("ca@example.org", "Test CA", is_authority=True)
    path = tmp_path / "authorities.pem"
    path.write_bytes(JANE.certificate_pem + endorser.certificate_pem)
    return endorser, path


def test_authority(folder: Folder, authority: tuple[Endorser, Path]) -> None:
    """An authority's endorser is trusted for what was endorsed while the certificate was valid."""
    issuer, path = authority
    settings = folder.configuration(trusted_fingerprints=(), trusted_ca_file=path)
    expiring = make_endorser("kim@example.org", "Kim", authority=issuer, not_after=NOW - 10 * DAY)

    folder.put(signed_document(expiring, created=NOW - 11 * DAY))
    entry = resolve(settings)
    assert entry.endorser.email == "kim@example.org"
    recheck(settings, entry)

    folder.put(signed_document(expiring, created=NOW - 9 * DAY))
    assert refusal(settings) == "endorser-untrusted"
    assert resolve(folder.configuration(trusted_fingerprints=(expiring.fingerprint,)))

    path.write_bytes(JANE.certificate_pem)
    assert recheck_refusal(settings, entry) == "endorser-untrusted"
    path.write_bytes(b"no certificates")
    assert recheck_refusal(settings, entry) == "authorities-unreadable"


def test_false_authority(folder: Folder, authority: tuple[Endorser, Path]) -> None:
    """Neither an authority's namesake nor a plain endorser can certify others."""
    _, path = authority
    settings = folder.configuration(trusted_fingerprints=(), trusted_ca_file=path)
    namesake = make_endorser("ca@example.org", "Test CA", is_authority=True, key_number=-5)
    for false in (namesake, JANE):
        folder.put(signed_document(make_endorser("eve@example.org", "Eve", authority=false)))
        assert refusal(settings) == "endorser-untrusted"


def test_policy_lists(folder: Folder, tmp_path: Path) -> None:
    """The site's lists decide, now and whenever the image is used again."""
    folder.put(signed_document(JANE))
    rules = tmp_path / "policy.cfg"
    settings = folder.configuration(policy_file=rules)
    assert refusal(settings) == "policy-unreadable"

    rules.write_text(f"[endorsers]\nwhitelistendorsers=\n {EMAIL}\n")
    entry = resolve(settings)
    for text, code in (
        ("[endorsers]\nwhitelistendorsers=\n other@example.org\n", "policy-endorser"),
        (f"[images]\nblacklistimages=\n {ID}\n", "policy-image"),
        (f"[checksums]\nblacklistchecksums=\n {entry.digests['sha1']}\n", "policy-checksum"),
    ):
        rules.write_text(text)
        assert refusal(settings) == code
        assert recheck_refusal(settings, entry) == code


def test_policy_chooses_among_endorsers(folder: Folder, tmp_path: Path) -> None:
    """The entry that passed the policy is the one used, not the first or newest of all."""
    folder.put(signed_document(JOHN, created=NOW - DAY), "a.xml")
    folder.put(signed_document(JANE, created=NOW - 9 * DAY), "b.xml")
    rules = tmp_path / "policy.cfg"
    rules.write_text("[endorsers]\nblacklistendorsers=\n john.doe@example.org\n")

    assert resolve(folder.configuration(policy_file=rules)).endorser.email == EMAIL


# Time


def test_expiry(folder: Folder) -> None:
    """An entry ends at its date, also for an image that is cached."""
    folder.put(signed_document(JANE, unsigned_document(valid_until=NOW + DAY)))
    settings = folder.configuration()
    entry = resolve(settings)

    recheck(settings, entry, NOW + DAY - timedelta(seconds=1))
    assert refusal(settings, now=NOW + DAY) == "entry-expired"
    assert recheck_refusal(settings, entry, NOW + DAY) == "entry-expired"
    folder.put(signed_document(JANE, unsigned_document(valid_until=None)))
    assert resolve(settings, now=NOW + 9999 * DAY)


def test_deprecation(folder: Folder) -> None:
    """A newer endorsement that deprecates hides the endorser's older ones, and only those."""
    older = signed_document(JANE, created=NOW - 3 * DAY)
    folder.put(older, "a.xml")
    settings = folder.configuration()
    entry = resolve(settings)
    gone = unsigned_document(deprecated="broken", locations=())
    folder.put(signed_document(JANE, gone, created=NOW - 2 * DAY), "b.xml")

    with pytest.raises(Refused) as caught:
        resolve(settings)
    assert caught.value.code == "entry-deprecated"
    assert "broken" in caught.value.message
    again = entry.model_copy(update={"deprecated": ""})
    assert recheck_refusal(settings, again) == "entry-deprecated"

    folder.put(signed_document(JOHN, created=NOW - 4 * DAY), "c.xml")
    assert resolve(settings).endorser.email == "john.doe@example.org"
    folder.put(signed_document(JANE, created=NOW - DAY), "d.xml")
    assert resolve(settings).endorser.email == EMAIL


def test_forged_deprecation(folder: Folder) -> None:
    """A deprecation that does not verify, or by an untrusted namesake, hides nothing."""
    folder.put(signed_document(JANE, created=NOW - 3 * DAY), "a.xml")
    gone = unsigned_document(deprecated="gone")
    signed = signed_document(JANE, gone, created=NOW - DAY)
    folder.put(signed.replace(b">gone<", b">GONE<"), "b.xml")
    stranger = make_endorser(key_number=-6)
    folder.put(signed_document(stranger, gone, created=NOW - DAY), "c.xml")

    assert resolve(folder.configuration()).deprecated is None


# Choice


def test_preferred_endorsers(folder: Folder) -> None:
    """The configured order wins over newness, newness over everything else."""
    folder.put(signed_document(JANE, created=NOW - 3 * DAY), "a.xml")
    folder.put(signed_document(JOHN, created=NOW - 2 * DAY), "b.xml")

    assert resolve(folder.configuration()).endorser.email == "john.doe@example.org"
    preferred = folder.configuration(preferred_endorsers=("none@example.org", EMAIL.upper()))
    assert resolve(preferred).endorser.email == EMAIL
    folder.put(signed_document(JANE, created=NOW - DAY), "c.xml")
    assert resolve(folder.configuration()).endorsed_at == NOW - DAY


def test_bad_neighbours(folder: Folder) -> None:
    """Broken and unsigned documents beside a good one do not matter."""
    folder.put(b"not xml " + ID.encode(), "a.xml")
    folder.put(unsigned_document(), "b.xml")
    folder.put(signed_document(JANE).replace(b"127.0.0.1", b"127.0.0.2"), "c.xml")
    settings = folder.configuration()
    assert refusal(settings) in {"signature-invalid", "signature-missing"}

    folder.put(signed_document(JOHN), "d.xml")
    assert resolve(settings).endorser.email == "john.doe@example.org"


def test_most_telling_reason(folder: Folder) -> None:
    """The error is that of the document that came furthest."""
    folder.put(b"not xml " + ID.encode(), "z.xml")
    assert refusal(folder.configuration()) == "document-encoding"
    folder.put(unsigned_document(), "b.xml")
    assert refusal(folder.configuration()) == "signature-missing"
    folder.put(signed_document(JANE, unsigned_document(valid_until=NOW - DAY)), "c.xml")
    assert refusal(folder.configuration()) == "entry-expired"


def test_pin(folder: Folder) -> None:
    """A digest in the reference must be the entry's."""
    folder.put(signed_document(JANE))
    settings = folder.configuration()
    sha256 = digests_of(IMAGE)["SHA-256"]

    assert resolve(settings, f"{ID}@sha256:{sha256}")
    assert refusal(settings, f"{ID}@sha256:{'0' * 64}") == "pin-mismatch"
    assert refusal(settings, f"{ID}@md5:{'0' * 32}") == "pin-mismatch"


# Content


def test_weak_digests(folder: Folder) -> None:
    """SHA-1 and MD5 alone cannot prove an image."""
    folder.put(signed_document(JANE, unsigned_document(algorithms=("SHA-1",))))
    assert refusal(folder.configuration()) == "digest-too-weak"
    for algorithm in ("SHA-256", "SHA-512"):
        folder.put(signed_document(JANE, unsigned_document(algorithms=("SHA-1", algorithm))))
        assert resolve(folder.configuration())


@pytest.mark.parametrize(
    "location",
    [
        "file:///etc/shadow", "FILE:///etc/shadow", "ftp://example.org/x", "https:host:uuid",
        "pdisk:host:1:uuid", "http:///x", "http://host:99999/x", "/etc/shadow", "http://a b/",
        "http://[::1/x",
    ],
)  # fmt: skip
def test_refused_location(origin: OriginServer, location: str) -> None:
    """A remote catalogue cannot name files, nor what we cannot fetch."""
    path = f"/metadata/{ID}"
    origin.add(path, signed_document(JANE, unsigned_document(locations=(location,))))
    settings = configuration(origin.url)
    with pytest.raises(Refused) as caught:
        resolve(settings)
    assert caught.value.code == "location-refused"
    assert location in caught.value.message

    good = "https://example.org/image.gz"
    both = unsigned_document(locations=(location, good), compression="gz")
    origin.add(path, signed_document(JANE, both))
    assert resolve(settings).locations == (good,)


def test_no_location(folder: Folder) -> None:
    """An entry without any location has a reason of its own."""
    folder.put(signed_document(JANE, unsigned_document(locations=())))
    assert refusal(folder.configuration()) == "location-missing"


def test_file_location_of_a_folder(folder: Folder) -> None:
    """A catalogue that is a folder may name files."""
    folder.put(signed_document(JANE, unsigned_document(locations=("file:///srv/image",))))
    assert resolve(folder.configuration()).locations == ("file:///srv/image",)


@pytest.mark.parametrize(
    ("words", "location", "expected"),
    [
        (("gz", "raw"), "http://h/x", ("gz", "raw")),
        (("", ""), "http://h/x", ("none", "raw")),
        (("", ""), "http://h/x.img.bz2?a=.gz", ("bz2", "raw")),
        (("", ""), "http://h/x.qcow2.gz", ("gz", "qcow2")),
        (("", ""), "http://h/x.qcow2", ("none", "qcow2")),
        (("none", "raw"), "http://h/x.gz", ("none", "raw")),
        (("zst", "qcow2"), "http://h/x", ("zst", "qcow2")),
    ],
)
def test_compression_and_format(
    folder: Folder, words: tuple[str, str], location: str, expected: tuple[str, str]
) -> None:
    """What the entry says counts, then what the location's name says."""
    compression, image_format = words
    folder.put(
        signed_document(
            JANE,
            unsigned_document(
                locations=(location,), compression=compression, image_format=image_format
            ),
        )
    )
    entry = resolve(folder.configuration())
    assert (entry.compression, entry.format) == expected


@pytest.mark.parametrize(
    ("words", "code"),
    [(("rar", "raw"), "compression-unsupported"), (("none", "vmdk"), "format-unsupported")],
)
def test_unsupported(folder: Folder, words: tuple[str, str], code: str) -> None:
    """Formats that cannot be opened are refused before anything is fetched."""
    document = unsigned_document(compression=words[0], image_format=words[1])
    folder.put(signed_document(JANE, document))
    assert refusal(folder.configuration()) == code


# Old documents


def test_legacy_documents(folder: Folder) -> None:
    """A genuine entry is judged by the policy on SHA-1, then by its age."""
    path = FIXTURES / "signed/valid-indate-newer-signature.xml"
    name = "BEE8-MMAw-Lk_IgsEExAy3d9R8h"
    fingerprint = "c2b83011b0eb8b2381c6458c4dce981f59861d0fe4e924f8266f2ba5fc59492b"
    folder.put(path.read_bytes())
    then = datetime(2015, 1, 1, tzinfo=UTC)

    assert refusal(folder.configuration(), name, then) == "signature-sha1"
    assert refusal(folder.configuration(legacy_sha1="allow"), name, then) == "endorser-untrusted"
    pinned = folder.configuration(legacy_sha1="allow-pinned", trusted_fingerprints=(fingerprint,))
    assert refusal(pinned, name) == "entry-expired"
    assert refusal(pinned, name, then) == "location-missing"


def test_legacy_recheck(folder: Folder) -> None:
    """When the policy on SHA-1 hardens, cached images are refused too."""
    folder.put(signed_document(JANE, sha1=True))
    allowed = folder.configuration(legacy_sha1="allow")
    entry = resolve(allowed)
    assert entry.trust == "legacy-sha1"

    recheck(folder.configuration(legacy_sha1="allow-pinned"), entry)
    assert recheck_refusal(folder.configuration(), entry) == "signature-sha1"
    assert (
        recheck_refusal(folder.configuration(legacy_sha1="allow", trusted_fingerprints=()), entry)
        == "endorser-untrusted"
    )
    unsigned = entry.model_copy(update={"trust": "unsigned"})
    assert recheck_refusal(allowed, unsigned) == "entry-unsigned"
    elsewhere = entry.model_copy(update={"catalogue": "gone"})
    assert recheck_refusal(allowed, elsewhere) == "catalogue-unknown"
