"""A site's lists of accepted and refused endorsers, checksums and images, in StratusLab's INI form.

    [endorsers]  whitelistendorsers, blacklistendorsers   e-mail addresses
    [checksums]  whitelistchecksums, blacklistchecksums   SHA-1 in hexadecimal
    [images]     whitelistimages, blacklistimages         identifiers

One value per line; an empty or absent list disables its filter. Each entry is judged alone, so the
entry that passes is the entry that is used.
"""

import configparser
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from stratocache.cache.errors import Refused

_MAX_BYTES = 1024 * 1024
_SECTIONS = ("endorsers", "checksums", "images")


@dataclass(frozen=True)
class Lists:
    """One section: what alone is accepted (when not empty), and what is never accepted."""

    white: frozenset[str] = frozenset()
    black: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Policy:
    """The six lists; the default applies none."""

    sections: Mapping[str, Lists] = field(default_factory=dict)

    def check(self, *, email: str, sha1: str, identifier: str) -> None:
        """Judge one entry, by endorser, checksum and image in this order.

        Raises `Refused` with code `policy-endorser`, `policy-checksum` or `policy-image`.
        """
        for section, value in (("endorsers", email), ("checksums", sha1), ("images", identifier)):
            lists = self.sections.get(section, Lists())
            key = _normal(section, value)
            if lists.white and key not in lists.white:
                raise _refused(section, f"{value} is not on whitelist{section}")
            if key in lists.black:
                raise _refused(section, f"{value} is on blacklist{section}")


def load(path: Path | None) -> Policy:
    """Read a policy file; no path means that no list applies.

    Raises `Refused` with code `policy-unreadable` when the file is missing, malformed, or has a
    section or key that is not one of the six lists: a misspelt list must not be an absent one.
    """
    if path is None:
        return Policy()
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_MAX_BYTES + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, str(error)) from None
    if len(text) > _MAX_BYTES:
        raise _unreadable(path, f"it is larger than {_MAX_BYTES} bytes")
    parser = configparser.ConfigParser(interpolation=None, default_section="")
    try:
        parser.read_string(text)
    except configparser.Error as error:
        raise _unreadable(path, " ".join(str(error).split())) from None
    return Policy({name: _section(path, name, parser[name]) for name in parser.sections()})


def _section(path: Path, name: str, keys: configparser.SectionProxy) -> Lists:
    if name not in _SECTIONS:
        raise _unreadable(path, f"section [{name}] is not one of {', '.join(_SECTIONS)}")
    lists = {
        key: frozenset(_normal(name, line.strip()) for line in value.splitlines() if line.strip())
        for key, value in keys.items()
    }
    white, black = f"whitelist{name}", f"blacklist{name}"
    for key in lists:
        if key not in (white, black):
            raise _unreadable(path, f"key {key} in [{name}] is neither {white} nor {black}")
    return Lists(lists.get(white, frozenset()), lists.get(black, frozenset()))


def _normal(section: str, value: str) -> str:
    """Identifiers are case-sensitive; addresses and checksums (numbers, zeros lead) are not."""
    if section == "checksums":
        return value.lower().lstrip("0")
    return value if section == "images" else value.lower()


def _refused(section: str, reason: str) -> Refused:
    return Refused(
        f"policy-{section.removesuffix('s')}", f"The site policy refuses this entry: {reason}."
    )


def _unreadable(path: Path, reason: str) -> Refused:
    return Refused(
        "policy-unreadable",
        f"The policy file {path} cannot be used, so nothing is accepted: {reason}.",
        field="policy_file",
    )
