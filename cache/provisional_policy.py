"""Whether a launch may use an image before anything of it is proven: the operator's word, per endorser.

Only images whose chunks no endorsed index proves are asked about: what a guest reads of one comes from
the endorser's origin as it is, and the digest of the whole is known when all of it is here. Where an
index proves each chunk nobody need be trusted for it (cache/DEMAND.md).
"""

from stratocache.cache.configuration import Configuration
from stratocache.cache.entry import Entry
from stratocache.cache.errors import Refused
from stratocache.cache.signature import normal_fingerprint


def provisional_allowed(configuration: Configuration, entry: Entry) -> bool:
    """Tell whether unproven bytes of an entry may be served to a launch that asks for it.

    What is set for the endorser's certificate decides, else what is set for the e-mail address, else
    what is set for the catalogue. Unsigned entries, and those of a catalogue that is no longer
    configured (so what was made on this host, too), never may.
    """
    settings = configuration.catalogues.get(entry.catalogue)
    if settings is None or entry.trust == "unsigned":
        return False
    endorsers = {_normal(name): item for name, item in settings.endorsers.items()}
    for name in (entry.endorser.fingerprint_sha256, entry.endorser.email.lower()):
        if name in endorsers:
            return endorsers[name].provisional == "allow"
    return settings.provisional == "allow"


def require_provisional(configuration: Configuration, entry: Entry) -> None:
    """Raise `Refused` (`provisional-refused`) unless a launch may use an image before it is verified.

    Where an index proves every chunk it always may.
    """
    if entry.index is not None or provisional_allowed(configuration, entry):
        return
    raise Refused(
        "provisional-refused",
        f"Image {entry.identifier} is not proven until all of it is here, and nothing allows that "
        f"images of {entry.endorser.email} are used before. Launch it without `provisional`, which "
        f"waits for it, or set catalogues.{entry.catalogue}.endorsers for this endorser.",
        field="provisional",
    )


def _normal(name: str) -> str:
    """Return the one form of a certificate's fingerprint or an e-mail address."""
    return name.lower() if "@" in name else normal_fingerprint(name)
