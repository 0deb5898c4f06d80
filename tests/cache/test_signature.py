"""Signatures: the genuine ones, and each known way to forge one."""

import base64
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import xmlsec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree
from support.documents import (
    EMAIL,
    NOW,
    Endorser,
    make_endorser,
    make_key,
    signed_document,
    unsigned_document,
)
from xmlsec import constants as xml_constants

from stratocache.cache import constraints, distinguished_name, document, publication, signature
from stratocache.cache.credentials import Credentials
from stratocache.cache.document import XMLDSIG
from stratocache.cache.errors import InvalidInput, NotVerified, Refused, StratocacheError

FIXTURES = Path(__file__).resolve().parents[2] / "../shared/fixtures/marketplace"
SIGNED = sorted(FIXTURES.glob("signed/*.xml"))
DS = f"{{{XMLDSIG}}}"


def judge(data: bytes, legacy_sha1: signature.LegacySha1 = "refuse") -> signature.Signer:
    """Check everything that a document by itself can prove."""
    entry = document.parse_one(data)
    metadata = constraints.check(entry, allow_unendorsed=True)
    signer = signature.verify(entry, legacy_sha1=legacy_sha1)
    assert metadata.endorsement is not None
    signature.check_identity(signer, metadata.endorsement)
    return signer


def refusal(data: bytes, legacy_sha1: signature.LegacySha1 = "refuse") -> str:
    with pytest.raises(StratocacheError) as caught:
        judge(data, legacy_sha1)
    return caught.value.code


def genuine() -> bytes:
    return signed_document(make_endorser())


def edit(change: Callable[[etree._Element], None], data: bytes | None = None) -> bytes:
    """Return a signed document after a change to its tree."""
    root = etree.fromstring(genuine() if data is None else data)
    change(root)
    edited: bytes = etree.tostring(root, encoding="UTF-8", xml_declaration=True)
    return edited


def find(root: etree._Element, name: str) -> etree._Element:
    element = root.find(f".//{DS}{name}")
    assert element is not None
    return element


def self_made(
    *,
    uri: str | None = "",
    transforms: tuple[object, ...] = (xml_constants.TransformEnveloped,),
    canonical: object = xml_constants.TransformExclC14N,
    method: object = xml_constants.TransformRsaSha512,
    digest: object = xml_constants.TransformSha512,
    body: bytes | None = None,
) -> bytes:
    """Sign an endorsed document with xmlsec alone, in whatever form is asked for."""
    endorser = make_endorser()
    root = etree.fromstring(genuine() if body is None else body)
    for old in root.findall(f"{DS}Signature"):
        root.remove(old)
    template = xmlsec.template.create(root, canonical, method)  # type: ignore[arg-type]
    root.append(template)
    reference = xmlsec.template.add_reference(template, digest, uri=uri)  # type: ignore[arg-type]
    for transform in transforms:
        xmlsec.template.add_transform(reference, transform)  # type: ignore[arg-type]
    key_info = xmlsec.template.ensure_key_info(template)
    xmlsec.template.x509_data_add_certificate(xmlsec.template.add_x509_data(key_info))
    context = xmlsec.SignatureContext()
    for element in root.iter():
        if "Id" in element.attrib:
            context.register_id(element, "Id")
    key = xmlsec.Key.from_memory(endorser.key_pem, xml_constants.KeyDataFormatPem)
    key.load_cert_from_memory(endorser.certificate_pem, xml_constants.KeyDataFormatPem)
    context.key = key
    context.sign(template)
    made: bytes = etree.tostring(root, encoding="UTF-8", xml_declaration=True)
    return made


@pytest.mark.parametrize("path", SIGNED, ids=lambda path: path.name)
def test_genuine_documents(path: Path) -> None:
    """Every genuine signature verifies where SHA-1 is allowed, and only there."""
    data = path.read_bytes()

    assert judge(data, "allow").legacy_sha1
    with pytest.raises(Refused) as caught:
        judge(data)
    assert caught.value.code == "signature-sha1"


def test_all_genuine_documents_are_there() -> None:
    """Seven signed documents are judged above."""
    assert len(SIGNED) == 7


@pytest.mark.parametrize("path", SIGNED, ids=lambda path: path.name)
def test_tampered_genuine_documents(path: Path) -> None:
    """A changed byte of the content breaks every genuine signature."""
    data = path.read_bytes().replace(
        b"StratusLab</dcterms:publisher>", b"StratusLaB</dcterms:publisher>"
    )
    assert data != path.read_bytes()
    assert refusal(data, "allow") == "signature-invalid"


def test_sha1_pinned() -> None:
    """allow-pinned accepts SHA-1 from listed certificates only, however they are written."""
    entry = document.parse_one(SIGNED[0].read_bytes())
    found = signature.verify(entry, legacy_sha1="allow").fingerprint_sha256
    colons = ":".join(found[i : i + 2] for i in range(0, 64, 2)).upper()

    assert signature.verify(entry, legacy_sha1="allow-pinned", pinned=[colons]).legacy_sha1
    with pytest.raises(Refused) as caught:
        signature.verify(entry, legacy_sha1="allow-pinned", pinned=["0" * 64])
    assert caught.value.code == "signature-sha1"
    assert found in caught.value.message


def test_our_own() -> None:
    """A document that we sign verifies with SHA-256, and with SHA-1 when asked for."""
    signer = judge(genuine())
    assert not signer.legacy_sha1
    assert signer.fingerprint_sha256 == make_endorser().fingerprint

    legacy = signed_document(make_endorser(), sha1=True)
    assert refusal(legacy) == "signature-sha1"
    assert judge(legacy, "allow").legacy_sha1


@pytest.mark.parametrize(
    "canonical",
    [
        xml_constants.TransformInclC14N,
        xml_constants.TransformInclC14NWithComments,
        xml_constants.TransformExclC14N,
        xml_constants.TransformExclC14NWithComments,
    ],
)
def test_other_signers(canonical: object) -> None:
    """Signatures made elsewhere, in the usual canonical forms, verify too."""
    assert judge(self_made(canonical=canonical))
    both = (xml_constants.TransformEnveloped, canonical)
    assert judge(self_made(transforms=both, canonical=canonical))


# Forgeries


def test_forged_value() -> None:
    """A changed location is noticed."""
    assert refusal(genuine().replace(b":9/image", b":9/other")) == "signature-invalid"


def test_forged_signature_value() -> None:
    """A signature by nobody's key is noticed."""

    def forge(root: etree._Element) -> None:
        find(root, "SignatureValue").text = base64.b64encode(b"x" * 256).decode()

    assert refusal(edit(forge)) == "signature-invalid"


def test_unsigned() -> None:
    """A document without a signature is not accepted."""
    assert refusal(unsigned_document()) == "signature-missing"
    unsigned = (FIXTURES / "unsigned/valid-full.xml").read_bytes()
    assert refusal(unsigned, "allow") == "signature-missing"


def test_comment_injection() -> None:
    """A comment inside a signed value, which canonical XML drops, is refused."""
    data = genuine().replace(b"/image</slterms", b"/ima<!-- x -->ge</slterms")
    assert refusal(data) == "document-comment"


def test_comment_injection_is_harmless_to_readers() -> None:
    """Even a tree with such a comment is read whole, not up to the comment."""
    data = genuine().replace(b"/image</slterms", b"/ima<!-- x -->ge</slterms")
    parser = etree.XMLParser(remove_comments=True, remove_pis=True)
    root = etree.fromstring(data)
    split = document.Document(data, root, etree.fromstring(data, parser))

    assert signature.verify(split)
    assert constraints.check(split).locations == ("http://127.0.0.1:9/image",)


def test_processing_instruction_injection() -> None:
    """An instruction inside a value is refused."""
    data = genuine().replace(b"/image</slterms", b"/ima<?x y?>ge</slterms")
    assert refusal(data) == "document-comment"


def test_document_type_declaration() -> None:
    """A DTD, which could define attributes and entities, is refused."""
    data = genuine().replace(b"<rdf:RDF", b'<!DOCTYPE rdf:RDF [<!ENTITY x "y">]>\n<rdf:RDF', 1)
    assert refusal(data) == "document-dtd"


def test_second_certificate() -> None:
    """An identity from one certificate and a key from another cannot be combined."""

    def forge(root: etree._Element) -> None:
        other = etree.SubElement(find(root, "X509Data"), f"{DS}X509Certificate")
        der = make_endorser("mallory@example.org", "Mallory").certificate.public_bytes(
            serialization.Encoding.DER
        )
        other.text = base64.b64encode(der).decode()

    assert refusal(edit(forge)) == "signature-certificates"


def test_second_certificate_in_its_own_data() -> None:
    """A second X509Data does not bring in a second certificate either."""

    def forge(root: etree._Element) -> None:
        copied = etree.fromstring(etree.tostring(find(root, "X509Data")))
        find(root, "KeyInfo").append(copied)

    assert refusal(edit(forge)) == "signature-certificates"


def test_swapped_certificate() -> None:
    """The signature must verify with the key of the certificate that names the endorser."""

    def forge(root: etree._Element) -> None:
        certificate = replaced_key_certificate()
        der = certificate.public_bytes(serialization.Encoding.DER)
        find(root, "X509Certificate").text = base64.b64encode(der).decode()

    assert refusal(edit(forge)) == "signature-invalid"


def replaced_key_certificate() -> x509.Certificate:
    """Return a certificate with the genuine names and another key."""
    return make_endorser(key_number=-7).certificate


def test_second_signature() -> None:
    """Only one signature may be there."""

    def forge(root: etree._Element) -> None:
        root.append(etree.fromstring(etree.tostring(find(root, "Signature"))))

    assert refusal(edit(forge)) == "signature-multiple"


def test_hidden_second_signature() -> None:
    """A second signature is found wherever it hides."""

    def forge(root: etree._Element) -> None:
        find(root, "KeyInfo").append(etree.Element(f"{DS}Signature"))

    assert refusal(edit(forge)) == "signature-multiple"


def test_key_value_only() -> None:
    """A key that vouches for itself is no certificate."""

    def forge(root: etree._Element) -> None:
        key_info = find(root, "KeyInfo")
        key_info.clear()
        numbers = make_key(1).public_key().public_numbers()
        value = etree.SubElement(etree.SubElement(key_info, f"{DS}KeyValue"), f"{DS}RSAKeyValue")
        for name, number in (("Modulus", numbers.n), ("Exponent", numbers.e)):
            raw = number.to_bytes((number.bit_length() + 7) // 8, "big")
            etree.SubElement(value, f"{DS}{name}").text = base64.b64encode(raw).decode()

    assert refusal(edit(forge)) == "signature-certificates"


def test_no_key_info() -> None:
    """A signature without any key is refused."""

    def forge(root: etree._Element) -> None:
        find(root, "Signature").remove(find(root, "KeyInfo"))

    assert refusal(edit(forge)) == "signature-content"


def test_moved_reference() -> None:
    """A valid signature over a part of the document does not vouch for the whole."""
    body = genuine().replace(b"<rdf:RDF ", b'<rdf:RDF Id="here" ', 1)
    data = self_made(uri="#here", body=body)
    entry = document.parse_one(data)
    context = xmlsec.SignatureContext()
    context.register_id(entry.root, "Id")
    context.key = xmlsec.Key.from_memory(
        make_endorser().certificate_pem, xml_constants.KeyDataFormatCertPem
    )
    context.verify(entry.signatures[0])

    with pytest.raises(NotVerified) as caught:
        signature.verify(entry)
    assert caught.value.code == "signature-reference"
    assert "#here" in caught.value.message


def test_wrapped_original() -> None:
    """The signed original, moved below a forged description, does not vouch for it."""

    def forge(root: etree._Element) -> None:
        original = etree.fromstring(genuine())
        moved = find(original, "Signature")
        holder = etree.SubElement(moved, f"{DS}Object")
        holder.append(etree.fromstring(genuine())[0])
        root.replace(find(root, "Signature"), moved)

    data = edit(forge).replace(b":9/image", b":9/other", 1)
    assert refusal(data) == "signature-content"


def test_second_reference() -> None:
    """A second reference, and none at all, are refused."""

    def double(root: etree._Element) -> None:
        find(root, "SignedInfo").append(etree.fromstring(etree.tostring(find(root, "Reference"))))

    def drop(root: etree._Element) -> None:
        find(root, "SignedInfo").remove(find(root, "Reference"))

    assert refusal(edit(double)) == "signature-reference"
    assert refusal(edit(drop)) == "signature-reference"


def test_reference_without_uri() -> None:
    """A reference that leaves it to the reader what is meant is refused."""

    def forge(root: etree._Element) -> None:
        del find(root, "Reference").attrib["URI"]

    assert refusal(edit(forge)) == "signature-reference"


@pytest.mark.parametrize(
    "algorithm",
    [
        "http://www.w3.org/TR/1999/REC-xpath-19991116",
        "http://www.w3.org/2002/06/xmldsig-filter2",
        "http://www.w3.org/TR/1999/REC-xslt-19991116",
        "http://www.w3.org/2000/09/xmldsig#base64",
    ],
)
def test_selecting_transform(algorithm: str) -> None:
    """Transforms that choose or compute what is signed are refused."""

    def add(root: etree._Element) -> None:
        etree.SubElement(find(root, "Transforms"), f"{DS}Transform", Algorithm=algorithm)

    def exchange(root: etree._Element) -> None:
        find(root, "Transform").set("Algorithm", algorithm)

    assert refusal(edit(add)) == "signature-transforms"
    assert refusal(edit(exchange)) == "signature-transforms"


def test_no_transform() -> None:
    """The enveloped-signature transform must be there."""

    def forge(root: etree._Element) -> None:
        find(root, "Reference").remove(find(root, "Transforms"))

    assert refusal(edit(forge)) == "signature-transforms"


@pytest.mark.parametrize(
    ("element", "algorithm"),
    [
        ("SignatureMethod", "http://www.w3.org/2000/09/xmldsig#hmac-sha1"),
        ("SignatureMethod", "http://www.w3.org/2001/04/xmldsig-more#hmac-sha256"),
        ("SignatureMethod", "http://www.w3.org/2001/04/xmldsig-more#rsa-md5"),
        ("SignatureMethod", "http://www.w3.org/2000/09/xmldsig#dsa-sha1"),
        ("SignatureMethod", ""),
        ("DigestMethod", "http://www.w3.org/2001/04/xmldsig-more#md5"),
        ("CanonicalizationMethod", "http://www.w3.org/TR/1999/REC-xslt-19991116"),
    ],
)
def test_other_algorithms(element: str, algorithm: str) -> None:
    """Algorithms outside the list are refused, whatever they would compute."""

    def forge(root: etree._Element) -> None:
        find(root, element).set("Algorithm", algorithm)

    assert refusal(edit(forge), "allow") == "signature-algorithm"


@pytest.mark.parametrize(("element", "parent"), [
    ("SignatureMethod", "SignedInfo"), ("DigestMethod", "Reference"),
])  # fmt: skip
def test_doubled_method(element: str, parent: str) -> None:
    """Two methods, of which readers might take different ones, are refused."""

    def forge(root: etree._Element) -> None:
        find(root, parent).append(etree.fromstring(etree.tostring(find(root, element))))

    assert refusal(edit(forge)) == "signature-algorithm"


def test_misplaced_signature() -> None:
    """A signature that is not a child of the root is refused."""

    def forge(root: etree._Element) -> None:
        root[0].append(find(root, "Signature"))

    assert refusal(edit(forge)) == "signature-misplaced"


def test_empty_signature() -> None:
    """An empty signature element signs nothing."""

    def forge(root: etree._Element) -> None:
        find(root, "Signature").clear()

    assert refusal(edit(forge)) == "signature-content"


def test_object_in_signature() -> None:
    """Content that rides inside the signature, unsigned, is refused."""

    def forge(root: etree._Element) -> None:
        etree.SubElement(find(root, "Signature"), f"{DS}Object").text = "x"

    assert refusal(edit(forge)) == "signature-content"


@pytest.mark.parametrize("text", ["", "!!!", "AAAA", "MIIB"])
def test_broken_certificate(text: str) -> None:
    """A certificate that cannot be read is refused."""

    def forge(root: etree._Element) -> None:
        find(root, "X509Certificate").text = text

    assert refusal(edit(forge)) == "signature-certificates"


def test_partly_broken_certificate() -> None:
    """A certificate that is only found broken when its names are read is refused as well."""

    def forge(root: etree._Element) -> None:
        der = make_endorser().certificate.public_bytes(serialization.Encoding.DER)
        broken = der.replace(b"\x0c\x0bJane Tester", b"\x30\x0bJane Tester")
        assert broken != der
        find(root, "X509Certificate").text = base64.b64encode(broken).decode()

    assert refusal(edit(forge)) == "signature-certificates"


def test_weak_key() -> None:
    """Keys that can be broken neither sign nor verify."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Weak")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(NOW)
        .not_valid_after(NOW + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )

    def forge(root: etree._Element) -> None:
        der = certificate.public_bytes(serialization.Encoding.DER)
        find(root, "X509Certificate").text = base64.b64encode(der).decode()

    assert refusal(edit(forge)) == "signature-key"
    with pytest.raises(InvalidInput) as caught:
        signed_document(Endorser(Credentials(key, certificate)), email=EMAIL)
    assert caught.value.code == "key-weak"


GENUINE = genuine()
SAID = constraints.check(document.parse_one(GENUINE))
CERTIFICATE = next(re.finditer(rb"<X509Certificate>[^<]*", GENUINE))


@pytest.mark.filterwarnings("ignore::UserWarning")  # the library's, on odd certificates
@given(st.integers(0, len(GENUINE) - 1), st.binary(min_size=0, max_size=3))
def test_any_change(position: int, replacement: bytes) -> None:
    """Whatever byte is changed, the document is refused or says exactly what it said.

    No signature covers the certificate itself: one that was changed is another certificate, with a
    fingerprint that nobody has pinned.
    """
    changed = GENUINE[:position] + replacement + GENUINE[position + 1 :]
    try:
        signer = judge(changed)
    except StratocacheError:
        return
    assert constraints.check(document.parse_one(changed)) == SAID
    same = signer.fingerprint_sha256 == make_endorser().fingerprint
    assert same or CERTIFICATE.start() < position < CERTIFICATE.end()


# Who signed


@pytest.mark.parametrize(
    ("element", "claim"),
    [
        ("subject", "CN=Somebody Else,O=Stratocache\\, tests,C=EU"),
        ("subject", "C=EU,O=Stratocache\\, tests,CN=Jane Tester"),
        ("subject", "no name at all"),
        ("issuer", "CN=TestCA,O=Stratocache\\, tests,C=EU"),
    ],
)
def test_claimed_names(element: str, claim: str) -> None:
    """Subject and issuer must be the certificate's; signing something else proves nothing."""
    text = genuine().decode()
    body = text.replace(
        f"<slreq:{element}>CN=Jane Tester,O=Stratocache\\, tests,C=EU",
        f"<slreq:{element}>{claim}",
    )
    assert body != text

    with pytest.raises(NotVerified) as caught:
        judge(self_made(body=body.encode()))
    assert caught.value.code == "signature-identity"
    assert caught.value.field == f"slreq:{element}"


def test_claimed_email() -> None:
    """An address in the certificate must be the endorser's; without one it is not compared."""
    body = genuine().replace(b">jane.tester@", b">mallory@")
    assert refusal(self_made(body=body)) == "signature-identity"

    unnamed = make_endorser("jane@example.org", "No Address", alternative_name=False)
    assert judge(signed_document(unnamed, email="other@example.org"))


def test_email_in_subject() -> None:
    """The address attribute is written as Java wrote it and read in every usual form."""
    endorser = make_endorser("ann@example.org", "Ann", email_in_subject=True)
    data = signed_document(endorser)
    der = "1.2.840.113549.1.9.1=#160f616e6e406578616d706c652e6f7267"
    assert data.count(der.encode()) == 2

    signer = judge(data)
    endorsement = constraints.check(document.parse_one(data)).endorsement
    assert endorsement is not None
    for form in (
        "1.2.840.113549.1.9.1=ann@example.org", "emailAddress=ann@example.org",
        "E=ann@example.org", "OID.1.2.840.113549.1.9.1=#160F616E6E406578616D706C652E6F7267",
        "1.2.840.113549.1.9.1=#0c0f616e6e406578616d706c652e6f7267",
    ):  # fmt: skip
        subject = endorsement.subject.replace(der, form)
        signature.check_identity(signer, replace(endorsement, subject=subject))


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("CN=a, O=b", "CN=a,O=b"),
        ("cn=a;o=b", "CN=a,O=b"),
        ('CN="a,b",O=c', "CN=a\\,b,O=c"),
        ("CN=a\\2Cb,O=c", "CN=a\\,b,O=c"),
        ("CN=J\\C3\\A9,O=c", "CN=J\u00e9,O=c"),
        ("CN=a+OU=b,O=c", "OU=b+CN=a,O=c"),
        ("2.5.4.3=a", "CN=a"),
        ("CN=a\\ ", 'CN="a "'),
    ],
)
def test_distinguished_names(text: str, same: str) -> None:
    """Spellings of one name are equal, and different names are not."""
    assert distinguished_name.parse(text) == distinguished_name.parse(same)
    assert distinguished_name.parse(text) != distinguished_name.parse("CN=A,O=b")


@pytest.mark.parametrize(
    "text", ["", "CN", "=x", "XX=a", "CN=#zz", "CN=#1605ab", "CN=#30020500", "CN=a,"]
)
def test_malformed_distinguished_names(text: str) -> None:
    """What is no name is refused."""
    with pytest.raises(ValueError, match=r".*"):
        distinguished_name.parse(text)


def test_signing_with_another_certificate() -> None:
    """A certificate of another key cannot be used to sign."""
    wrong = Credentials(make_key(1), make_endorser().certificate)
    with pytest.raises(InvalidInput) as caught:
        publication.endorse(unsigned_document(), wrong, created=NOW)
    assert caught.value.code == "key-mismatch"
