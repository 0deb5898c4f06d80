"""Reading XML that anybody may have written."""

from pathlib import Path

import pytest
from support.documents import make_endorser, signed_document, unsigned_document

from stratocache.cache import constraints, document, signature
from stratocache.cache.errors import InvalidInput, NotVerified

FIXTURES = Path(__file__).resolve().parents[2] / "../shared/fixtures/marketplace"


def refusal(data: bytes) -> NotVerified:
    with pytest.raises(NotVerified) as caught:
        document.parse(data)
    return caught.value


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*/*.xml")), ids=lambda path: path.name)
def test_fixtures_parse(path: Path) -> None:
    """Every genuine document, valid or not, is one well-formed entry."""
    data = path.read_bytes()

    [entry] = document.parse(data)

    assert entry.data == data


def test_list_entries_verify_alone() -> None:
    """Each entry of a list answer is verified as the document that it was before."""
    first, second = (FIXTURES / "signed" / name for name in (
        "valid-ca-signed.xml", "valid-full-signature.xml"))  # fmt: skip
    bodies = [path.read_bytes().partition(b"?>")[2] for path in (first, second)]
    answer = b"<?xml version='1.0'?>\n<metadata>\n" + b"\n".join(bodies) + b"</metadata>"

    entries = document.parse(answer)

    assert len(entries) == 2
    for entry in entries:
        assert signature.verify(entry, legacy_sha1="allow").legacy_sha1


def test_empty_list() -> None:
    """A list may be empty; one entry may not."""
    assert document.parse(b"<metadata/>") == []
    with pytest.raises(NotVerified) as caught:
        document.parse_one(b"<metadata/>")
    assert caught.value.code == "document-root"


@pytest.mark.parametrize("root", [b"<error>no</error>", b"<html/>", b"<RDF/>"])
def test_other_root(root: bytes) -> None:
    """Error pages and other XML are not entries."""
    assert refusal(root).code == "document-root"


@pytest.mark.parametrize("data", [b"<a", b"<rdf:RDF/>", b"<a></b>", b"<a>&undefined;</a>"])
def test_malformed(data: bytes) -> None:
    """What is not XML is refused."""
    assert refusal(data).code == "document-malformed"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not xml",
        "<metadata/>".encode("utf-16"),
        "<metadata/>".encode("utf-16-le"),
        "<metadata/>".encode("utf-32"),
        "<metadata/>".encode("cp500"),
        b"<?xml version='1.0' encoding='UTF-7'?><metadata/>",
        b"\xef\xbb\xbf<?xml version='1.0' encoding='cp500'?><metadata/>",
    ],
)
def test_encodings(data: bytes) -> None:
    """Only encodings in which a document type declaration can be seen are read."""
    assert refusal(data).code == "document-encoding"


def test_dtd() -> None:
    """A document type declaration is refused before it is read."""
    laughs = b'<!DOCTYPE m [<!ENTITY a "haha"><!ENTITY b "&a;&a;">]><m>&b;</m>'
    assert refusal(laughs).code == "document-dtd"
    external = b'<!DOCTYPE metadata SYSTEM "http://127.0.0.1:9/x.dtd"><metadata/>'
    assert refusal(external).code == "document-dtd"


def test_size_limit(tmp_path: Path) -> None:
    """One byte more than the limit is refused, in memory and in a file."""
    long = b"<a>" + b" " * (document.MAX_BYTES // 10 - 10) + b"</a>"
    data = b"<metadata>" + (long * 10).ljust(document.MAX_BYTES - 20) + b"</metadata>"
    assert len(data) == document.MAX_BYTES + 1
    assert refusal(data).code == "document-too-large"

    path = tmp_path / "large.xml"
    path.write_bytes(data)
    with pytest.raises(NotVerified) as caught:
        document.read(path)
    assert caught.value.code == "document-too-large"
    assert document.parse(data.replace(b" ", b"", 1)) == []


def test_element_limit() -> None:
    """A document of millions of tiny elements is refused before it fills the memory."""
    assert (
        refusal(b"<metadata>" + b"<a/>" * 1_000_000 + b"</metadata>").code == "document-too-large"
    )


def test_depth_limit() -> None:
    """Nesting beyond what an entry needs is refused, not followed."""
    deep = b"<metadata>" + b"<a>" * 100_000 + b"</a>" * 100_000 + b"</metadata>"
    assert refusal(deep).code == "document-malformed"


def test_unreadable_file(tmp_path: Path) -> None:
    """A missing file is the caller's error."""
    with pytest.raises(InvalidInput) as caught:
        document.read(tmp_path / "none.xml")
    assert caught.value.code == "document-unreadable"


def test_comments_between_elements() -> None:
    """Comments and instructions that split no value are no fault, and never data."""
    data = unsigned_document().replace(
        b"<dcterms:type>", b"<!-- a comment --><?note x?>\n<dcterms:type>"
    )
    entry = document.parse_one(signed_document(make_endorser(), data))

    assert signature.verify(entry)
    assert constraints.check(entry).terms["slterms:kind"] == "machine"
