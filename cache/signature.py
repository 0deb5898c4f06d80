"""Enveloped XML signatures over entries: judging them strictly, making them simply.

The form is the original one: a single `ds:Signature`, child of the root, with a single Reference of
URI "" whose first transform is enveloped-signature, and the one certificate that has the key. All
else that XML-DSig can say is refused *before* anything is computed, so that what is verified is
always the whole document and the key is always the certificate's.

Whether the certificate is *trusted* is not decided here.
"""

import base64
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import xmlsec
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from lxml import etree
from xmlsec import constants

from stratocache.cache import distinguished_name
from stratocache.cache.document import XMLDSIG, Document, spell
from stratocache.cache.errors import InvalidInput, NotVerified, Refused
from stratocache.cache.metadata import Endorsement

LegacySha1 = Literal["refuse", "allow-pinned", "allow"]
MIN_KEY_BITS = 2048

_SHA1_METHODS = {f"{XMLDSIG}rsa-sha1": constants.TransformRsaSha1}
_SHA1_DIGESTS = {f"{XMLDSIG}sha1": constants.TransformSha1}
_METHODS = _SHA1_METHODS | {
    "http://www.w3.org/2001/04/xmldsig-more#rsa-sha256": constants.TransformRsaSha256,
    "http://www.w3.org/2001/04/xmldsig-more#rsa-sha512": constants.TransformRsaSha512,
}
_DIGESTS = _SHA1_DIGESTS | {
    "http://www.w3.org/2001/04/xmlenc#sha256": constants.TransformSha256,
    "http://www.w3.org/2001/04/xmlenc#sha512": constants.TransformSha512,
}
_C14N = "http://www.w3.org/TR/2001/REC-xml-c14n-20010315"
_EXCLUSIVE = "http://www.w3.org/2001/10/xml-exc-c14n#"
_CANONICAL = {
    _C14N: constants.TransformInclC14N,
    f"{_C14N}#WithComments": constants.TransformInclC14NWithComments,
    _EXCLUSIVE: constants.TransformExclC14N,
    f"{_EXCLUSIVE}WithComments": constants.TransformExclC14NWithComments,
}
_UNREADABLE = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
_ENVELOPED = f"{XMLDSIG}enveloped-signature"


@dataclass(frozen=True, eq=False)
class Signer:
    """Whose key a document's signature verifies with."""

    certificate: x509.Certificate
    fingerprint_sha256: str
    legacy_sha1: bool
    """The signature rests on SHA-1, which an attacker can collide."""


@dataclass(frozen=True, eq=False)
class _Parts:
    """What the signature says, after its shape was found acceptable."""

    signature: etree._Element
    method: str
    digest: str
    certificate: x509.Certificate

    @property
    def legacy_sha1(self) -> bool:
        return self.method in _SHA1_METHODS or self.digest in _SHA1_DIGESTS


def verify(
    document: Document, *, legacy_sha1: LegacySha1 = "refuse", pinned: Collection[str] = ()
) -> Signer:
    """Verify a document's signature and return who made it.

    `pinned` are the fingerprints for which `allow-pinned` accepts SHA-1. Raises `NotVerified` with
    code `signature-missing`, `-multiple`, `-misplaced`, `-reference`, `-transforms`, `-algorithm`,
    `-content`, `-certificates`, `-key` or `-invalid`, and `Refused` with code `signature-sha1`.
    """
    parts = _parts(document)
    fingerprint = fingerprint_of(parts.certificate)
    if parts.legacy_sha1:
        check_legacy(legacy_sha1, fingerprint, pinned)
    context = xmlsec.SignatureContext()
    public_key = parts.certificate.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    for transform in (_METHODS[parts.method], *_CANONICAL.values()):
        context.enable_signature_transform(transform)
    for transform in (constants.TransformEnveloped, _DIGESTS[parts.digest], *_CANONICAL.values()):
        context.enable_reference_transform(transform)
    try:
        context.key = xmlsec.Key.from_memory(public_key, constants.KeyDataFormatPem)
        context.verify(parts.signature)
    except xmlsec.Error:
        raise NotVerified(
            "signature-invalid",
            "The signature does not verify: the document was changed after it was signed.",
            field="ds:Signature",
        ) from None
    return Signer(parts.certificate, fingerprint, parts.legacy_sha1)


def check_legacy(legacy_sha1: LegacySha1, fingerprint: str, pinned: Collection[str]) -> None:
    """Apply the policy on SHA-1 signatures; raises `Refused` with code `signature-sha1`."""
    if legacy_sha1 == "refuse":
        raise Refused(
            "signature-sha1",
            "The signature rests on SHA-1, which the policy legacy_sha1 = refuse does not accept; "
            "ask the endorser to sign again, or set legacy_sha1 to allow-pinned or allow.",
        )
    if legacy_sha1 == "allow-pinned" and fingerprint not in map(normal_fingerprint, pinned):
        raise Refused(
            "signature-sha1",
            "The signature rests on SHA-1 and its certificate is not pinned; "
            f"add {fingerprint} to trusted_fingerprints or ask the endorser to sign again.",
        )


def check_identity(signer: Signer, endorsement: Endorsement) -> None:
    """Compare the certificate with the endorser that the document names.

    Subject and issuer must be the certificate's, and the e-mail address too when the certificate
    names one. Raises `NotVerified` with code `signature-identity`.
    """
    certificate = signer.certificate
    claims = [("slreq:subject", endorsement.subject, certificate.subject)]
    claims += [("slreq:issuer", issuer, certificate.issuer) for issuer in endorsement.issuers]
    for element, claimed, proven in claims:
        try:
            agrees = distinguished_name.parse(claimed) == distinguished_name.of_certificate(proven)
        except ValueError:
            agrees = False
        if not agrees:
            raise _identity(element, claimed, distinguished_name.write(proven))
    emails = certificate_emails(certificate)
    if emails and endorsement.email.lower() not in map(str.lower, emails):
        raise _identity("slreq:email", endorsement.email, ", ".join(emails))


def certificate_emails(certificate: x509.Certificate) -> list[str]:
    """Return the e-mail addresses of a certificate's alternative names."""
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    return extension.value.get_values_for_type(x509.RFC822Name)


def fingerprint_of(certificate: x509.Certificate) -> str:
    """Return the SHA-256 of a certificate in lower-case hexadecimal."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def normal_fingerprint(text: str) -> str:
    """Return a configured fingerprint without colons and blanks, in lower case."""
    return text.replace(":", "").replace(" ", "").lower()


def sign(
    root: etree._Element, key: rsa.RSAPrivateKey, certificate: x509.Certificate, *, sha1: bool
) -> bytes:
    """Add a signature to an unsigned entry and return the document's bytes.

    RSA-SHA256, or RSA-SHA1 for readers of long ago. Raises `InvalidInput` with code `key-mismatch`
    when the certificate has another key, or `key-weak`.
    """
    if key.public_key() != certificate.public_key():
        raise InvalidInput("key-mismatch", "The certificate belongs to another key; give its own.")
    if key.key_size < MIN_KEY_BITS:
        raise InvalidInput(
            "key-weak", f"The key has {key.key_size} bits; at least {MIN_KEY_BITS} are needed."
        )
    template = xmlsec.template.create(
        root,
        constants.TransformInclC14NWithComments,
        constants.TransformRsaSha1 if sha1 else constants.TransformRsaSha256,
    )
    root.append(template)
    reference = xmlsec.template.add_reference(
        template, constants.TransformSha1 if sha1 else constants.TransformSha256, uri=""
    )
    xmlsec.template.add_transform(reference, constants.TransformEnveloped)
    x509_data = xmlsec.template.add_x509_data(xmlsec.template.ensure_key_info(template))
    element = etree.SubElement(x509_data, f"{{{XMLDSIG}}}X509Certificate")
    der = certificate.public_bytes(serialization.Encoding.DER)
    element.text = base64.encodebytes(der).decode("ascii").strip()
    context = xmlsec.SignatureContext()
    context.key = xmlsec.Key.from_memory(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
        constants.KeyDataFormatPem,
    )
    context.sign(template)
    return etree.tostring(root.getroottree(), encoding="UTF-8", xml_declaration=True)


def _parts(document: Document) -> _Parts:
    signatures = document.signatures
    if not signatures:
        raise _shape("missing", "The document is not signed; only signed entries are accepted")
    if len(signatures) > 1:
        raise _shape(
            "multiple", f"The document has {len(signatures)} ds:Signature elements, not one"
        )
    signature = signatures[0]
    if signature.getparent() is not document.root:
        raise _shape("misplaced", "ds:Signature must be a child of rdf:RDF")
    _check_content(signature)
    info = _one(signature, "SignedInfo", "content")
    method = _algorithm(_one(info, "SignatureMethod", "algorithm"), _METHODS)
    _algorithm(_one(info, "CanonicalizationMethod", "algorithm"), _CANONICAL)
    references = info.findall(f"{{{XMLDSIG}}}Reference")
    if len(references) != 1 or references[0].get("URI") != "":
        uris = ", ".join(repr(str(reference.get("URI"))) for reference in references)
        raise _shape(
            "reference", f'ds:Reference must be one, with URI="" (the whole document), not {uris}'
        )
    _check_transforms(references[0])
    digest = _algorithm(_one(references[0], "DigestMethod", "algorithm"), _DIGESTS)
    return _Parts(signature, method, digest, _certificate(signature))


def _check_content(signature: etree._Element) -> None:
    allowed = [f"{{{XMLDSIG}}}{name}" for name in ("SignedInfo", "SignatureValue", "KeyInfo")]
    if [child.tag for child in signature.iterchildren("*")] != allowed:
        found = ", ".join(spell(child) for child in signature.iterchildren("*")) or "nothing"
        raise _shape(
            "content",
            "ds:Signature must hold ds:SignedInfo, ds:SignatureValue and ds:KeyInfo with the "
            f"certificate, not {found}",
        )


def _check_transforms(reference: etree._Element) -> None:
    transforms = [
        transform.get("Algorithm", "")
        for transform in reference.iterfind(f"{{{XMLDSIG}}}Transforms/{{{XMLDSIG}}}Transform")
    ]
    if transforms[:1] != [_ENVELOPED] or len(transforms) > 2:
        listed = ", ".join(transforms) or "none"
        raise _shape("transforms", f"ds:Transform must be enveloped-signature alone, not {listed}")
    if any(transform not in _CANONICAL for transform in transforms[1:]):
        raise _shape("transforms", f"ds:Transform {transforms[1]} is not accepted")


def _certificate(signature: etree._Element) -> x509.Certificate:
    elements = list(signature.iter(f"{{{XMLDSIG}}}X509Certificate"))
    if len(elements) != 1:
        raise _shape(
            "certificates", f"ds:KeyInfo must hold one ds:X509Certificate, not {len(elements)}"
        )
    try:
        der = base64.b64decode("".join((elements[0].text or "").split()), validate=True)
        certificate = x509.load_der_x509_certificate(der)
        key = certificate.public_key()
        _read_all(certificate)
    except _UNREADABLE as error:
        raise _shape("certificates", f"ds:X509Certificate cannot be read: {error}") from None
    if not isinstance(key, rsa.RSAPublicKey) or key.key_size < MIN_KEY_BITS:
        raise _shape("key", f"The certificate's key must be RSA with at least {MIN_KEY_BITS} bits")
    return certificate


def _read_all(certificate: x509.Certificate) -> None:
    """Read the parts that are otherwise only read, and found broken, when somebody needs them."""
    _ = certificate.subject, certificate.issuer, certificate.extensions
    _ = certificate.not_valid_before_utc, certificate.not_valid_after_utc


def _algorithm(element: etree._Element, allowed: Collection[str]) -> str:
    algorithm = element.get("Algorithm", "")
    if algorithm not in allowed:
        raise _shape("algorithm", f"{spell(element)} {algorithm or 'without Algorithm'} is refused")
    return algorithm


def _one(parent: etree._Element, name: str, code: str) -> etree._Element:
    elements = parent.findall(f"{{{XMLDSIG}}}{name}")
    if len(elements) != 1:
        raise _shape(code, f"{spell(parent)} must have one ds:{name}, not {len(elements)}")
    return elements[0]


def _shape(code: str, reason: str) -> NotVerified:
    return NotVerified(f"signature-{code}", f"{reason}.", field="ds:Signature")


def _identity(element: str, claimed: str, proven: str) -> NotVerified:
    return NotVerified(
        "signature-identity",
        f'{element} is "{claimed[:200]}" but the certificate says "{proven}".',
        field=element,
    )
