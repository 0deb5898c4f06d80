"""What an entry must say, element by element, whoever signed it.

The rules are those of the original validator: its constraints, its RDF model check and the types of
its published schema (xml:base, identifier, bytes, checksum, endorsement, slterms and dcterms). The
*order* of elements, which the schema fixes and RDF gives no meaning, is a note, not a fault; so is a
word outside the customary vocabulary of kind, format, compression and bus.

Faults are found in the order of the document's parts: root, description, RDF shape, required
elements, optional ones, and last the presence of `dcterms:type`.
"""

import re
from collections.abc import Iterator
from datetime import UTC, datetime

from lxml import etree

from stratocache.cache import identifier as identifiers
from stratocache.cache.document import (
    DCTERMS,
    RDF,
    SLREQ,
    SLTERMS,
    STRATOCACHE,
    XML,
    XMLDSIG,
    Document,
    spell,
)
from stratocache.cache.entry import EndorsedIndex
from stratocache.cache.metadata import ALGORITHMS, BASE, DATE_FORMAT, Endorsement, Metadata
from stratocache.cache.rdf import check_node, fault

_IDENTIFIER = re.compile(r"[A-Za-z0-9_-]{27}")
_EMAIL = re.compile(r"[A-Za-z0-9._%+-]+@[A-Za-z0-9.-]+")
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")
_HEXADECIMAL = re.compile(r"[A-Fa-f0-9]+")
_INTEGER = re.compile(r"[+-]?[0-9]+")
_NON_NEGATIVE = re.compile(r"\+?[0-9]+|-0+")
_INDEX_URL = re.compile(r"(https?://[^/\s]|file:///)[^\s]{0,2040}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_SIZE_DIGITS = 18
_BLANKS = " \t\r\n"

_ABOUT = f"{{{RDF}}}about"
_DESCRIPTION = f"{{{RDF}}}Description"
_SIGNATURE = f"{{{XMLDSIG}}}Signature"
_PARSE_TYPE = f"{{{RDF}}}parseType"
_REQUIRED_ORDER = (
    f"{{{DCTERMS}}}identifier", f"{{{SLREQ}}}bytes", f"{{{SLREQ}}}checksum", f"{{{SLREQ}}}endorsement",
)  # fmt: skip
_AT_MOST_ONCE = (
    *(
        f"{{{SLTERMS}}}{name}"
        for name in (
            "serial-number", "version", "deprecated", "os", "os-arch", "os-version", "kind", "disks-bus",
        )
    ),
    *(
        f"{{{DCTERMS}}}{name}"
        for name in (
            "valid", "created", "format", "compression", "creator", "publisher", "title",
            "description", "alternative",
        )
    ),
)  # fmt: skip
_PLAIN_REPEATED = tuple(
    f"{{{SLTERMS}}}{name}"
    for name in ("hypervisor", "inbound-port", "outbound-port", "icmp", "location")
)
_RANGES = {
    f"{{{SLTERMS}}}inbound-port": 65535,
    f"{{{SLTERMS}}}outbound-port": 65535,
    f"{{{SLTERMS}}}icmp": 255,
}
_VOCABULARY = {
    "slterms:kind": ("machine", "disk"),
    "slterms:disks-bus": ("ide", "scsi", "virtio"),
    "dcterms:format": ("raw", "qcow2"),
    "dcterms:compression": ("none", "gz", "bz2", "xz", "zst", ""),
}


def check(document: Document, *, allow_unendorsed: bool = False) -> Metadata:
    """Check a document and return what it says.

    `allow_unendorsed` accepts an empty endorsement, as it is before signing. Raises `NotVerified`
    with code `document-invalid`; the message names the first faulty element and its value.
    """
    description = _check_root(document.values)
    _check_about_form(description)
    check_node(description)
    name, size_bytes = _check_identifier(description), _check_bytes(description)
    digests = _check_checksums(description)
    _check_identity(description, name, digests["sha1"])
    endorsement = _check_endorsement(description, allow_unendorsed=allow_unendorsed)
    terms = _check_optional(description)
    valid = description.find(f"{{{DCTERMS}}}valid")
    index = _check_index(description)
    _check_type(description)
    return Metadata(
        identifier=name,
        size_bytes=size_bytes,
        digests=digests,
        endorsement=endorsement,
        locations=tuple(
            text
            for element in description.iterfind(f"{{{SLTERMS}}}location")
            if (text := (element.text or "").strip())
        ),
        valid_until=None if valid is None else _date(valid),
        index=index,
        terms=terms,
        notes=tuple(_notes(description, terms)),
    )


def _check_root(root: etree._Element) -> etree._Element:
    base = root.get(f"{{{XML}}}base")
    if base != BASE:
        raise fault(root, f'xml:base is {_quoted(base)}; rdf:RDF must have xml:base="{BASE}"')
    descriptions = list(root.iterchildren(_DESCRIPTION))
    if not descriptions:
        raise fault(root, "rdf:RDF has no rdf:Description")
    if len(descriptions) > 1:
        raise fault(descriptions[1], "there is a second rdf:Description; an entry has one")
    for child in root.iterchildren("*"):
        if child.tag not in (_DESCRIPTION, _SIGNATURE):
            raise fault(child, f"{spell(child)} is not allowed beside rdf:Description")
    text = (root.text or "") + "".join(child.tail or "" for child in root)
    if text.strip():
        raise fault(root, f'rdf:RDF has text "{text.strip()[:40]}" among its elements')
    return descriptions[0]


def _check_about_form(description: etree._Element) -> None:
    for attribute in map(str, description.attrib):
        if attribute != _ABOUT:
            raise fault(description, f"rdf:Description has the attribute {spell(attribute)}")
    about = description.get(_ABOUT)
    if about is None or not _IDENTIFIER.fullmatch(about.removeprefix("#")) or about[0] != "#":
        raise fault(
            description,
            f'rdf:about is {_quoted(about)}; it must be "#" and a 27-character identifier',
        )


def _check_identifier(description: etree._Element) -> str:
    element = _only(description, f"{{{DCTERMS}}}identifier")
    text = _plain(element)
    about = str(description.get(_ABOUT))
    if not _IDENTIFIER.fullmatch(text):
        raise fault(
            element, f"dcterms:identifier is {_quoted(text)}, not 27 characters A-Za-z0-9_-"
        )
    if about != f"#{text}":
        raise fault(
            element, f'dcterms:identifier is "{text}" but rdf:about is "{about}"; they must agree'
        )
    return text


def _check_bytes(description: etree._Element) -> int:
    element = _only(description, f"{{{SLREQ}}}bytes")
    text = _plain(element).strip(_BLANKS)
    if not _NON_NEGATIVE.fullmatch(text) or len(text.lstrip("+-0")) > _MAX_SIZE_DIGITS:
        raise fault(element, f"slreq:bytes is {_quoted(text)}; it must be a number of bytes")
    return int(text.lstrip("+-0") or "0")


def _check_checksums(description: etree._Element) -> dict[str, str]:
    elements = list(description.iterchildren(f"{{{SLREQ}}}checksum"))
    if not elements:
        raise fault(description, "slreq:checksum is missing")
    digests: dict[str, str] = {}
    sha1_count = 0
    for element in elements:
        algorithm, value = _checksum(element)
        sha1_count += algorithm == "sha1"
        if algorithm != "sha1" and digests.get(algorithm, value) != value:
            raise fault(element, f"slreq:checksum gives two different values for {algorithm}")
        digests[algorithm] = value
    if sha1_count != 1:
        raise fault(elements[-1], f"slreq:checksum names SHA-1 {sha1_count} times; once is needed")
    return digests


def _checksum(element: etree._Element) -> tuple[str, str]:
    _check_resource(element, {f"{{{SLREQ}}}algorithm", f"{{{SLREQ}}}value"})
    algorithm_element = _only(element, f"{{{SLREQ}}}algorithm")
    value_element = _only(element, f"{{{SLREQ}}}value")
    algorithm, value = _plain(algorithm_element), _plain(value_element)
    if algorithm not in ALGORITHMS:
        raise fault(
            algorithm_element,
            f"slreq:algorithm of slreq:checksum is {_quoted(algorithm)}; "
            f"it must be one of {', '.join(ALGORITHMS)}",
        )
    if not _HEXADECIMAL.fullmatch(value):
        raise fault(
            value_element, f"slreq:value of slreq:checksum is {_quoted(value)}, not hexadecimal"
        )
    key, digits = ALGORITHMS[algorithm]
    # Digests are compared as numbers, so leading zeros say nothing.
    number = value.lower().lstrip("0").zfill(digits)
    if len(number) > digits:
        raise fault(
            value_element,
            f"slreq:value of slreq:checksum has {len(number)} digits; {algorithm} has {digits}",
        )
    return key, number


def _check_identity(description: etree._Element, name: str, sha1: str) -> None:
    if not identifiers.is_identifier(name) or identifiers.decode(name) != sha1:
        raise fault(
            _only(description, f"{{{DCTERMS}}}identifier"),
            f'dcterms:identifier is "{name}" but the SHA-1 in slreq:checksum belongs to '
            f'"{identifiers.encode(sha1)}"',
        )


def _check_endorsement(
    description: etree._Element, *, allow_unendorsed: bool
) -> Endorsement | None:
    element = _only(description, f"{{{SLREQ}}}endorsement")
    if allow_unendorsed and len(element) == 0 and not (element.text or "").strip():
        return None
    created_tag, endorser_tag = f"{{{DCTERMS}}}created", f"{{{SLREQ}}}endorser"
    _check_resource(element, {created_tag, endorser_tag})
    created = _date(_only(element, created_tag))
    endorser = _only(element, endorser_tag)
    tags = {name: f"{{{SLREQ}}}{name}" for name in ("email", "subject", "issuer")}
    _check_resource(endorser, set(tags.values()))
    email = _only(endorser, tags["email"])
    if not _EMAIL.fullmatch(_plain(email)):
        raise fault(email, f"slreq:email is {_quoted(_plain(email))}; it must be an e-mail address")
    subject = _plain(_only(endorser, tags["subject"]))
    issuers = [_plain(issuer) for issuer in endorser.iterchildren(tags["issuer"])]
    if not issuers:
        raise fault(endorser, "slreq:issuer is missing in slreq:endorser")
    for name, text in (("subject", subject), *(("issuer", text) for text in issuers)):
        if not text.strip():
            raise fault(endorser, f"slreq:{name} is empty; it must be a distinguished name")
    return Endorsement(created, _plain(email), subject.strip(), tuple(map(str.strip, issuers)))


def _check_resource(element: etree._Element, allowed: set[str]) -> None:
    name = spell(element)
    parse_type = element.get(_PARSE_TYPE)
    if parse_type != "Resource":
        raise fault(element, f'rdf:parseType of {name} is {_quoted(parse_type)}, not "Resource"')
    for child in element.iterchildren("*"):
        if child.tag not in allowed:
            raise fault(child, f"{spell(child)} is not allowed inside {name}")


def _check_optional(description: etree._Element) -> dict[str, str]:
    terms: dict[str, str] = {}
    for tag in _AT_MOST_ONCE:
        elements = list(description.iterchildren(tag))
        if len(elements) > 1:
            raise fault(elements[1], f"{spell(tag)} occurs {len(elements)} times; once is the most")
        for element in elements:
            terms[spell(tag)] = _plain(element).strip()
    for element in description.iterchildren(*_PLAIN_REPEATED):
        text = _plain(element).strip(_BLANKS)
        maximum = _RANGES.get(str(element.tag))
        if maximum is not None and _number(text) not in range(maximum + 1):
            raise fault(
                element,
                f"{spell(element)} is {_quoted(text)}; it must be a number from 0 to {maximum}",
            )
    serial = terms.get("slterms:serial-number", "0")
    if not _NON_NEGATIVE.fullmatch(serial):
        raise fault(
            _only(description, f"{{{SLTERMS}}}serial-number"),
            f"slterms:serial-number is {_quoted(serial)}; it must be a number, not negative",
        )
    for name in ("valid", "created"):
        for element in description.iterchildren(f"{{{DCTERMS}}}{name}"):
            _date(element)
    return terms


def _check_index(description: etree._Element) -> EndorsedIndex | None:
    """Return the chunk index that an entry endorses, in our own namespace, if there is one."""
    elements = list(description.iterchildren(f"{{{STRATOCACHE}}}index"))
    if not elements:
        return None
    if len(elements) > 1:
        raise fault(elements[1], f"{spell(elements[1])} occurs {len(elements)} times; once is most")
    tags = {name: f"{{{STRATOCACHE}}}{name}" for name in ("url", "sha256")}
    _check_resource(elements[0], set(tags.values()))
    url, sha256 = (_only(elements[0], tag) for tag in tags.values())
    location, digest = _plain(url).strip(_BLANKS), _plain(sha256).strip(_BLANKS).lower()
    if not _INDEX_URL.fullmatch(location):
        raise fault(
            url, f"stratocache:url is {_quoted(location)}; it must be an http, https or file URL"
        )
    if not _SHA256.fullmatch(digest):
        raise fault(sha256, f"stratocache:sha256 is {_quoted(digest)}, not 64 hexadecimal digits")
    return EndorsedIndex(url=location, sha256=digest)


def _check_type(description: etree._Element) -> None:
    element = _only(description, f"{{{DCTERMS}}}type")
    _plain(element)


def _date(element: etree._Element) -> datetime:
    text = _plain(element)
    try:
        if _DATE.fullmatch(text):
            return datetime.strptime(text, DATE_FORMAT).replace(tzinfo=UTC)
    except ValueError:
        pass
    parent = element.getparent()
    inside = "" if parent is None or parent.tag == _DESCRIPTION else f" of {spell(parent)}"
    raise fault(
        element,
        f"{spell(element)}{inside} is {_quoted(text)}; it must be a date YYYY-MM-DDThh:mm:ssZ",
    )


def _number(text: str) -> int | None:
    return int(text) if _INTEGER.fullmatch(text) and len(text) <= _MAX_SIZE_DIGITS else None


def _only(parent: etree._Element, tag: str) -> etree._Element:
    """Return the one child of that name; none and several are faults."""
    elements = list(parent.iterchildren(tag))
    if not elements:
        raise fault(parent, f"{spell(tag)} is missing in {spell(parent)}")
    if len(elements) > 1:
        raise fault(elements[1], f"{spell(tag)} occurs {len(elements)} times; once is needed")
    return elements[0]


def _plain(element: etree._Element) -> str:
    """Return the text of an element that may hold nothing else."""
    if len(element):
        raise fault(element, f"{spell(element)} must be plain text, without elements inside")
    for attribute in map(str, element.attrib):
        if not attribute.startswith(f"{{{XML}}}"):
            raise fault(element, f"{spell(element)} must not have {spell(attribute)}")
    return element.text or ""


def _notes(description: etree._Element, terms: dict[str, str]) -> Iterator[str]:
    ranks = [_REQUIRED_ORDER.index(str(c.tag)) if c.tag in _REQUIRED_ORDER else len(_REQUIRED_ORDER)
             for c in description.iterchildren("*")]  # fmt: skip
    if ranks != sorted(ranks):
        yield "elements are not in the order of the published schema"
    for name, words in _VOCABULARY.items():
        if name in terms and terms[name] not in words:
            yield f'{name} is "{terms[name][:40]}", not one of {", ".join(filter(None, words))}'


def _quoted(text: str | None) -> str:
    return "missing" if text is None else f'"{text[:60]}"'
