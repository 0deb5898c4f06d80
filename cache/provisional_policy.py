"""Whether a launch may use an image before anything of it is proven: the operator's word, per endorser.

Only images whose chunks no endorsed index proves are asked about: what a guest reads of one comes from
the endorser's origin as it is, and the digest of the whole is known when all of it is here. Where an
index proves each chunk nobody need be trusted for it (cache/DEMAND.md).
"""

from stratocache.cache.configuration import Configuration
from stratocache.cache.entry import Entry
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


def _normal(name: str) -> str:
    """Return the one form of a certificate's fingerprint or an e-mail address."""
    return name.lower() if "@" in name else normal_fingerprint(name)
