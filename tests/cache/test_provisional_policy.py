"""Whose images may be used before they are proven."""

from typing import Any

from support.api_daemon import entry

from stratocache.cache.configuration import Configuration
from stratocache.cache.entry import Entry
from stratocache.cache.provisional_policy import provisional_allowed

FINGERPRINT = "ab" * 32


def allowed(settings: dict[str, Any], wanted: Entry | None = None) -> bool:
    """Judge Jane's entry by a catalogue's settings."""
    catalogue = {"endpoint": "http://127.0.0.1:9", **settings}
    configuration = Configuration.model_validate({"catalogues": {"stratuslab": catalogue}})
    return provisional_allowed(configuration, wanted or jane())


def jane(**changes: Any) -> Entry:
    """Return an entry that Jane signed."""
    endorser = entry().endorser.model_copy(
        update={"email": "jane@example.org", "fingerprint_sha256": FINGERPRINT}
    )
    return entry().model_copy(update={"endorser": endorser, **changes})


def test_refused_unless_said() -> None:
    """Without a word in the configuration nobody's unproven bytes are served."""
    assert not allowed({})
    assert not allowed({"endorsers": {"else@example.org": {"provisional": "allow"}}})


def test_endorser_is_named_by_address() -> None:
    """An e-mail address, in any case, allows its endorser alone."""
    assert allowed({"endorsers": {"Jane@Example.org": {"provisional": "allow"}}})


def test_certificate_goes_before_address() -> None:
    """What is said of the certificate decides against what is said of the address."""
    colons = ":".join([FINGERPRINT.upper()[i : i + 2] for i in range(0, 64, 2)])
    names = {"jane@example.org": {"provisional": "allow"}, colons: {"provisional": "refuse"}}
    assert not allowed({"endorsers": names})


def test_endorser_goes_before_catalogue() -> None:
    """One endorser can be left out of a catalogue that allows all."""
    assert allowed({"provisional": "allow"})
    refused = {"jane@example.org": {"provisional": "refuse"}}
    assert not allowed({"provisional": "allow", "endorsers": refused})


def test_nobody_speaks_for_unsigned_entries() -> None:
    """Unsigned entries, and those of a catalogue that is not configured any more, are refused."""
    assert not allowed({"provisional": "allow"}, jane(trust="unsigned"))
    assert not allowed({"provisional": "allow"}, jane(catalogue="gone"))
