"""Each rule of an entry's content, by one document that breaks it."""

import re
from datetime import UTC, datetime
from pathlib import Path

import pytest

from stratocache.cache import constraints, document
from stratocache.cache.errors import NotVerified
from stratocache.cache.metadata import Endorsement, Metadata

FIXTURES = Path(__file__).resolve().parents[2] / "../shared/fixtures/marketplace"
FULL = (FIXTURES / "unsigned/valid-full.xml").read_bytes().decode()
CHECKSUM = (
    '<slreq:checksum rdf:parseType="Resource"><slreq:algorithm>{}</slreq:algorithm>'
    "<slreq:value>{}</slreq:value></slreq:checksum>"
)


def check(text: str, *, allow_unendorsed: bool = False) -> Metadata:
    entry = document.parse_one(text.encode())
    return constraints.check(entry, allow_unendorsed=allow_unendorsed)


def fault(text: str) -> NotVerified:
    with pytest.raises(NotVerified) as caught:
        check(text)
    assert caught.value.code == "document-invalid"
    return caught.value


def change(pattern: str, replacement: str, text: str = FULL) -> str:
    changed, count = re.subn(pattern, lambda _: replacement, text, count=1, flags=re.DOTALL)
    assert count == 1, f"{pattern} is not in the document"
    return changed


def put(xml: str) -> str:
    """Return the full document with more elements in its description."""
    return change("</rdf:Description>", xml + "</rdf:Description>")


INVALID = {
    "invalid-bad-about-id": ("rdf:about", "#MMZu9WvwKIro-rtBQ"),
    "invalid-bad-element-for-signature": ("rdf:Description", "second"),
    "invalid-bad-endorser-parsetype": ("slreq:endorser", "BAD"),
    "invalid-bad-inbound-port": ("slterms:inbound-port", "65536"),
    "invalid-bad-serial-number": ("slterms:serial-number", "X"),
    "invalid-checksum-value": ("slreq:value of slreq:checksum", "XYZ"),
    "invalid-created-date-2": ("dcterms:created", "2011-01-24T99:59:42Z"),
    "invalid-email": ("slreq:email", "jane.tester_at_example.org"),
    "invalid-inconsistent-identifiers": ("dcterms:identifier", "MMZu9WvwKIro-rtBQfDk4PsKO77"),
    "invalid-multiple-os": ("slterms:os ", "2 times"),
    "invalid-multiple-os-arch": ("slterms:os-arch", "2 times"),
    "invalid-multiple-versions": ("slterms:version", "2 times"),
    "invalid-no-endorsement": ("slreq:endorsement", "missing"),
    "invalid-no-xml-base": ("xml:base", "missing"),
    "invalid-rdf-resource": ("ex:dummy", "rdf:parseType"),
    "invalid-valid-date-2": ("dcterms:valid", "2011-01-24T99:59:42Z"),
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_fixture(name: str) -> None:
    """The fault that a genuine invalid document is named for is the one reported."""
    text = (FIXTURES / f"invalid/{name}.xml").read_text()

    message = fault(text).message

    assert all(part in message for part in INVALID[name]), message


def test_no_invalid_fixture_is_forgotten() -> None:
    """Every genuine invalid document has its fault listed above."""
    assert {path.stem for path in FIXTURES.glob("invalid/*.xml")} == set(INVALID)


@pytest.mark.parametrize(
    "name",
    ["valid-full", "valid-full-alt-cimi", "valid-minimal", "valid-minimal-leading-zero-sha1"],
)
def test_valid_fixture(name: str) -> None:
    """Genuine valid documents satisfy every rule."""
    metadata = check((FIXTURES / f"unsigned/{name}.xml").read_text())

    assert metadata.identifier == "MMZu9WvwKIro-rtBQfDk4PsKO7_"
    assert metadata.digests == {"sha1": "c319bbd5afc0a22ba3eaed0507c39383ec28eeff"}
    assert metadata.size_bytes == 100


def test_values() -> None:
    """What a document says is returned."""
    metadata = check(FULL)

    assert metadata.endorsement == Endorsement(
        datetime(2011, 1, 24, 9, 59, 42, tzinfo=UTC),
        "jane.tester@example.org",
        "CN=Jane Tester,OU=Testing Department,O=StratusLab Project,C=EU",
        ("CN=Jane Tester,OU=Testing Department,O=StratusLab Project,C=EU",),
    )
    assert metadata.valid_until == datetime(2011, 7, 23, 10, 59, 42, tzinfo=UTC)
    assert metadata.locations == ("http://example.org/...",)
    assert metadata.deprecated == "security issue with app"
    assert metadata.terms["slterms:os-arch"] == "i486"
    assert metadata.notes == ()


def test_empty_endorsement() -> None:
    """An empty endorsement is accepted only where a document waits for its signature."""
    text = (FIXTURES / "unsigned/valid-minimal-empty-endorsement.xml").read_text()

    assert check(text, allow_unendorsed=True).endorsement is None
    assert "dcterms:created" in fault(text).message


def test_default_namespaces() -> None:
    """Names are read by namespace, whatever the prefix."""
    text = change(
        "<slreq:bytes>100</slreq:bytes>", '<bytes xmlns="http://mp.stratuslab.eu/slreq#">7</bytes>'
    )
    assert check(text).size_bytes == 7


IDENTITY = "<dcterms:identifier>MMZu9WvwKIro-rtBQfDk4PsKO7_</dcterms:identifier>"
BYTES = "<slreq:bytes>100</slreq:bytes>"
FAULTS = [
    # root and description
    ('xml:base="http://mp.stratuslab.eu/"', 'xml:base="http://mp.stratuslab.eu"', "xml:base"),
    ('xml:base="[^"]*"', 'xml:base="http://example.org/"', "xml:base"),
    ("<rdf:Description.*</rdf:Description>", "", "rdf:Description"),
    ("</rdf:Description>", "</rdf:Description><rdf:Description/>", "second rdf:Description"),
    ("</rdf:Description>", "</rdf:Description><ex:thing/>", "ex:thing"),
    ("</rdf:Description>", "</rdf:Description>text", "text"),
    ('rdf:about="[^"]*"', "", "rdf:about"),
    ('rdf:about="#', 'rdf:about="', "rdf:about"),
    ('rdf:about="#MM', 'rdf:about="#M.', "rdf:about"),
    ('rdf:about="', 'about="', "about"),
    ('<rdf:Description ', '<rdf:Description dcterms:title="x" ', "dcterms:title"),
    ('<rdf:Description ', '<rdf:Description rdf:ID="x" ', "rdf:ID"),
    # required elements
    (IDENTITY, "", "dcterms:identifier is missing"),
    (IDENTITY, IDENTITY * 2, "dcterms:identifier occurs 2 times"),
    (IDENTITY, IDENTITY.replace("MM", "NM"), "dcterms:identifier"),
    (IDENTITY, IDENTITY.replace(">MM", "> MM"), "dcterms:identifier"),
    (IDENTITY, "<dcterms:identifier/>", "dcterms:identifier"),
    (BYTES, "", "slreq:bytes is missing"),
    (BYTES, BYTES * 2, "slreq:bytes occurs 2 times"),
    (BYTES, "<slreq:bytes>-1</slreq:bytes>", "slreq:bytes"),
    (BYTES, "<slreq:bytes>1.5</slreq:bytes>", "slreq:bytes"),
    (BYTES, "<slreq:bytes>1e3</slreq:bytes>", "slreq:bytes"),
    (BYTES, "<slreq:bytes/>", "slreq:bytes"),
    (BYTES, f"<slreq:bytes>{'9' * 19}</slreq:bytes>", "slreq:bytes"),
    (BYTES, f"<slreq:bytes>{'9' * 9999}</slreq:bytes>", "slreq:bytes"),
    (BYTES, "<slreq:bytes>\u0661</slreq:bytes>", "slreq:bytes"),
    # checksums
    ("<slreq:checksum.*</slreq:checksum>", "", "slreq:checksum is missing"),
    ("SHA-1<", "SHA-256<", "SHA-1 0 times"),
    ("SHA-1<", "SHA1<", "slreq:algorithm"),
    ("SHA-1<", "SHA-3<", "slreq:algorithm"),
    ("<slreq:algorithm>SHA-1</slreq:algorithm>", "", "slreq:algorithm"),
    ("<slreq:value>.*</slreq:value>", "", "slreq:value"),
    ("<slreq:value>.*</slreq:value>", "<slreq:value/>", "slreq:value"),
    ("<slreq:value>c319", "<slreq:value>d319", "SHA-1"),
    ("<slreq:value>c319", "<slreq:value>1c319", "slreq:value"),
    ("<slreq:value>c319", "<slreq:value> c319", "slreq:value"),
    ('checksum rdf:parseType="Resource"', "checksum", "slreq:checksum"),
    ('checksum rdf:parseType="Resource"', 'checksum rdf:parseType="Literal"', "slreq:checksum"),
    ('checksum rdf:parseType="Resource"', 'checksum rdf:parseType="resource"', "slreq:checksum"),
    ("</slreq:value>", "</slreq:value><ex:more>x</ex:more>", "ex:more"),
    # endorsement
    ("<slreq:endorsement.*</slreq:endorsement>", "", "slreq:endorsement is missing"),
    ('endorsement rdf:parseType="Resource"', "endorsement", "slreq:endorsement"),
    ('endorser rdf:parseType="Resource"', "endorser", "slreq:endorser"),
    ("<dcterms:created>2011-01-24T09:59:42Z</dcterms:created>", "", "dcterms:created"),
    ("<slreq:endorser .*</slreq:endorser>", "", "slreq:endorser"),
    ("<slreq:email>.*</slreq:email>", "", "slreq:email"),
    ("jane.tester@example.org", "jane tester@example.org", "slreq:email"),
    ("jane.tester@example.org", "@example.org", "slreq:email"),
    ("jane.tester@example.org", "jane@example.org\n", "slreq:email"),
    ("<slreq:subject>.*</slreq:subject>", "", "slreq:subject"),
    ("<slreq:subject>.*</slreq:subject>", "<slreq:subject> </slreq:subject>", "slreq:subject"),
    ("<slreq:issuer>.*</slreq:issuer>", "", "slreq:issuer"),
    ("2011-01-24T09:59:42Z", "2011-01-24", "dcterms:created"),
    ("2011-01-24T09:59:42Z", "2011-01-24T09:59:42", "dcterms:created"),
    ("2011-01-24T09:59:42Z", "2011-01-24T09:59:42.0Z", "dcterms:created"),
    ("2011-01-24T09:59:42Z", "2011-01-24T09:59:42+00:00", "dcterms:created"),
    ("2011-01-24T09:59:42Z", "2011-02-29T09:59:42Z", "dcterms:created"),
    ("2011-01-24T09:59:42Z", "0000-01-24T09:59:42Z", "dcterms:created"),
    ("2011-01-24T09:59:42Z", " 2011-01-24T09:59:42Z", "dcterms:created"),
    # optional elements
    ("2011-07-23T10:59:42Z", "2011-07-23T10:59:60Z", "dcterms:valid"),
    ("2011-07-23T10:59:42Z", "never", "dcterms:valid"),
    ("serial-number>0", "serial-number>-1", "slterms:serial-number"),
    ("serial-number>0", "serial-number>1.0", "slterms:serial-number"),
    ("serial-number>0", "serial-number>", "slterms:serial-number"),
    ("inbound-port>443", "inbound-port>-1", "slterms:inbound-port"),
    ("inbound-port>443", "inbound-port>http", "slterms:inbound-port"),
    ("inbound-port>443", "inbound-port>", "slterms:inbound-port"),
    ("outbound-port>25", "outbound-port>65536", "slterms:outbound-port"),
    ("icmp>8", "icmp>256", "slterms:icmp"),
    ("icmp>8", f"icmp>{'9' * 9999}", "slterms:icmp"),
    ("<dcterms:type>machine</dcterms:type>", "", "dcterms:type is missing"),
    ("<dcterms:type>machine", "<dcterms:type><ex:a/>", "dcterms:type"),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "replacement", "named"), FAULTS)
def test_fault(pattern: str, replacement: str, named: str) -> None:
    """A document with one rule broken is refused with the faulty element named."""
    message = fault(change(pattern, replacement)).message

    assert named in message, message


@pytest.mark.parametrize(
    "name",
    [
        "slterms:serial-number", "slterms:version", "slterms:deprecated", "slterms:os",
        "slterms:os-arch", "slterms:os-version", "dcterms:valid", "dcterms:title",
        "dcterms:publisher", "dcterms:description", "dcterms:type",
    ],
)  # fmt: skip
def test_at_most_once(name: str) -> None:
    """Elements that may occur once are refused the second time."""
    element = re.search(f"<{name}>.*?</{name}>", FULL, re.DOTALL)
    assert element is not None

    message = fault(put(element[0])).message

    assert f"{name} occurs 2 times" in message


@pytest.mark.parametrize(
    "name",
    ["slterms:kind", "slterms:disks-bus", "dcterms:format", "dcterms:compression",
     "dcterms:creator", "dcterms:alternative"],
)  # fmt: skip
def test_optional_at_most_once(name: str) -> None:
    """Optional elements that the full example lacks may occur once, too."""
    element = f"<{name}>x</{name}>"

    assert check(put(element)).terms[name] == "x"
    assert f"{name} occurs 2 times" in fault(put(element * 2)).message


def test_several_checksums() -> None:
    """Each algorithm is kept in its normal form; contradictions are refused."""
    sha256 = "0" * 62 + "Ff"
    text = put(CHECKSUM.format("SHA-256", "Ff") + CHECKSUM.format("MD5", "0" * 32))

    assert check(text).digests["sha256"] == sha256.lower()
    twice = put(CHECKSUM.format("SHA-256", "aa") + CHECKSUM.format("SHA-256", "ab"))
    assert "sha256" in fault(twice).message
    second_sha1 = put(CHECKSUM.format("SHA-1", "c319bbd5afc0a22ba3eaed0507c39383ec28eeff"))
    assert "SHA-1 2 times" in fault(second_sha1).message
    assert "slreq:value" in fault(put(CHECKSUM.format("SHA-256", "a" * 65))).message


def test_several_issuers() -> None:
    """The schema lets an endorser name several issuers."""
    text = change("</slreq:issuer>", "</slreq:issuer><slreq:issuer>CN=x</slreq:issuer>")
    endorsement = check(text).endorsement
    assert endorsement is not None
    assert endorsement.issuers[1] == "CN=x"


@pytest.mark.parametrize(
    "xml",
    [
        "<ex:a>text</ex:a>",
        "<ex:a/>",
        '<ex:a rdf:resource="http://example.org/"/>',
        '<ex:a rdf:parseType="Resource"><ex:b rdf:parseType="Resource"><ex:c>1</ex:c></ex:b></ex:a>',
        '<ex:a rdf:parseType="Literal">any <b>mixed</b> text</ex:a>',
        '<ex:a rdf:parseType="Collection"><rdf:Description rdf:about="#x"/></ex:a>',
        "<ex:a><ex:Node><ex:b>striped</ex:b></ex:Node></ex:a>",
        "<ex:a><rdf:Description><ex:b>1</ex:b></rdf:Description></ex:a>",
        '<ex:a rdf:datatype="http://www.w3.org/2001/XMLSchema#int">1</ex:a>',
        "<rdf:li>1</rdf:li>",
        "<slterms:unheard-of>x</slterms:unheard-of>",
        "<dcterms:isReplacedBy>#x</dcterms:isReplacedBy>",
        "<slterms:location>https:host.example.org:uuid</slterms:location>",
        "<slterms:location>pdisk:host:443:uuid</slterms:location>",
        "<slterms:icmp>0</slterms:icmp><slterms:icmp>255</slterms:icmp>",
        "<slterms:inbound-port> 0 </slterms:inbound-port>",
        "<slterms:outbound-port>65535</slterms:outbound-port>",
    ],
)
def test_allowed_additions(xml: str) -> None:
    """Foreign elements in any legal RDF shape, and repeated ones, are no fault."""
    assert check(put(xml)).identifier


@pytest.mark.parametrize(
    "xml",
    [
        "<ex:a><ex:b>1</ex:b></ex:a>",
        "<ex:a><ex:b/><ex:c/></ex:a>",
        "<ex:a>text<ex:b/></ex:a>",
        '<ex:a rdf:parseType="BAD"><ex:b/></ex:a>',
        '<ex:a rdf:parseType="Resource">text</ex:a>',
        '<ex:a rdf:parseType="Resource"><ex:b><ex:c>1</ex:c><ex:d/></ex:b></ex:a>',
        '<ex:a rdf:parseType="Resource" rdf:resource="#x"/>',
        '<ex:a rdf:resource="#x">text</ex:a>',
        '<ex:a rdf:parseType="Collection">text</ex:a>',
        "<ex:a><rdf:li/></ex:a>",
        '<ex:a><ex:B rdf:about="#x" rdf:ID="y"/></ex:a>',
        "<rdf:Description/>",
        "<rdf:about>x</rdf:about>",
        "stray text",
    ],
)
def test_illegal_rdf(xml: str) -> None:
    """Shapes that RDF/XML does not know are refused."""
    assert fault(put(xml)).message


def test_notes() -> None:
    """Unusual order and unusual words are told, not refused."""
    text = put(
        "<slterms:kind>toaster</slterms:kind><dcterms:compression/>"
        "<dcterms:format>vmdk</dcterms:format>"
    )
    moved = change(BYTES, "", change("</rdf:Description>", f"{BYTES}</rdf:Description>", text))

    notes = " ".join(check(moved).notes)

    assert "order" in notes
    assert "toaster" in notes
    assert "vmdk" in notes
    assert "compression" not in notes
