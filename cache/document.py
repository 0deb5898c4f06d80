"""Reading catalogue answers as XML, safely: one `rdf:RDF` entry or a `<metadata>` list of them.

Every entry becomes a `Document` of its own, because each was signed as one: the apex of canonical
XML is its root, not the list around it. A document keeps two trees of the *same* bytes. `root` has
comments and is what signatures are computed on; `values` has neither comments nor processing
instructions and is the only tree that data is read from, since a comment inside a value would be
invisible to the signature and would cut the value short for a reader.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from lxml import etree

from stratocache.cache.errors import InvalidInput, NotVerified

MAX_BYTES = 10_240_000
"""The limit of the original server (metadata.max.bytes)."""
_MAX_TAGS = 400_000
"""An entry has about a hundred; each costs far more memory than its bytes."""

RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
DCTERMS = "http://purl.org/dc/terms/"
SLREQ = "http://mp.stratuslab.eu/slreq#"
SLTERMS = "http://mp.stratuslab.eu/slterms#"
STRATOCACHE = "http://stratocache.org/terms#"
"""Our own terms, which other readers pass over."""
XMLDSIG = "http://www.w3.org/2000/09/xmldsig#"
XML = "http://www.w3.org/XML/1998/namespace"
PREFIXES = {
    RDF: "rdf", DCTERMS: "dcterms", SLREQ: "slreq", SLTERMS: "slterms", XMLDSIG: "ds", XML: "xml",
    STRATOCACHE: "stratocache",
}  # fmt: skip

_ROOT_TAG = f"{{{RDF}}}RDF"
_SIGNATURE_TAG = f"{{{XMLDSIG}}}Signature"
_LIST_NAME = "metadata"
_ENCODINGS = {"", "utf-8", "utf8", "us-ascii", "ascii", "iso-8859-1"}
_DECLARATION = re.compile(rb"<\?xml\s[^>]*?encoding\s*=\s*[\"']([^\"']*)[\"']")


@dataclass(frozen=True, eq=False)
class Document:
    """One entry as it was published; see the module for the two trees."""

    data: bytes
    root: etree._Element
    values: etree._Element

    @property
    def signatures(self) -> list[etree._Element]:
        """Every `ds:Signature`, wherever it lies."""
        return list(self.root.iter(_SIGNATURE_TAG))


def parse(data: bytes) -> list[Document]:
    """Read one entry, or a list answer, which may be empty.

    Raises `NotVerified` with code `document-too-large`, `document-encoding`, `document-dtd`,
    `document-malformed`, `document-root` or `document-comment`.
    """
    tree = _tree(data, keep_comments=True)
    if tree.tag == _ROOT_TAG:
        return [_document(data)]
    if etree.QName(tree).localname != _LIST_NAME:
        raise NotVerified(
            "document-root",
            f"The root element is {spell(tree)}; an entry is rdf:RDF, a list is metadata.",
        )
    return [
        _document(etree.tostring(entry, with_tail=False, encoding="UTF-8", xml_declaration=False))
        for entry in tree.iterchildren(_ROOT_TAG)
    ]


def parse_one(data: bytes) -> Document:
    """Read exactly one entry; raises as `parse` does, and `document-root` for another number."""
    documents = parse(data)
    if len(documents) != 1:
        raise NotVerified(
            "document-root", f"{len(documents)} entries were found where one was expected."
        )
    return documents[0]


def read(path: Path) -> bytes:
    """Return a file's bytes, never more than a document may have.

    Raises `InvalidInput` with code `document-unreadable`, `NotVerified` with code
    `document-too-large`.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InvalidInput(
            "document-unreadable", f"{path} cannot be read: {error.strerror}."
        ) from None
    if len(data) > MAX_BYTES:
        raise _too_large()
    return data


def spell(name: str | etree._Element) -> str:
    """Write the name of an element or attribute as documents usually do: `slreq:bytes`."""
    parts = etree.QName(name)
    prefix = PREFIXES.get(parts.namespace or "")
    if prefix is None and isinstance(name, etree._Element):
        prefix = name.prefix
    if prefix is not None:
        return f"{prefix}:{parts.localname}"
    return parts.localname if parts.namespace is None else parts.text


def _document(data: bytes) -> Document:
    root = _tree(data, keep_comments=True)
    _refuse_split_values(root)
    return Document(data, root, _tree(data, keep_comments=False))


def _tree(data: bytes, *, keep_comments: bool) -> etree._Element:
    if len(data) > MAX_BYTES or data.count(b"<") > _MAX_TAGS:
        raise _too_large()
    _refuse_encodings(data)
    if b"<!DOCTYPE" in data:
        raise _has_dtd()
    parser = etree.XMLParser(
        resolve_entities=False,
        load_dtd=False,
        no_network=True,
        huge_tree=False,
        remove_comments=not keep_comments,
        remove_pis=not keep_comments,
    )
    try:
        root = etree.fromstring(data, parser)
    except (etree.XMLSyntaxError, ValueError) as error:
        raise NotVerified("document-malformed", f"This is not well-formed XML: {error}.") from None
    # The scan above sees every DOCTYPE that these encodings can spell; this is the second lock.
    if root.getroottree().docinfo.internalDTD is not None:
        raise _has_dtd()
    return root


def _refuse_encodings(data: bytes) -> None:
    text = data.removeprefix(b"\xef\xbb\xbf").lstrip()
    declared = _DECLARATION.match(text)
    encoding = declared.group(1).decode("ascii", "replace").lower() if declared else ""
    if encoding not in _ENCODINGS or b"\0" in data or not text.startswith(b"<"):
        raise NotVerified(
            "document-encoding",
            f"This is not XML in an accepted encoding ({encoding or 'none declared'}); use UTF-8.",
        )


def _refuse_split_values(root: etree._Element) -> None:
    for node in root.iter(etree.Comment, etree.ProcessingInstruction):
        parent = node.getparent()
        if parent is None:
            continue
        own_text = (parent.text or "") + "".join(child.tail or "" for child in parent)
        if own_text.strip():
            raise NotVerified(
                "document-comment",
                f"A comment or processing instruction splits the value of {spell(parent)} "
                f"(line {node.sourceline}); remove it.",
                field=spell(parent),
            )


def _too_large() -> NotVerified:
    return NotVerified(
        "document-too-large",
        f"The document has more than {MAX_BYTES} bytes or {_MAX_TAGS} tags, the limits.",
    )


def _has_dtd() -> NotVerified:
    return NotVerified(
        "document-dtd", "The document has a document type declaration; entries must not have one."
    )
