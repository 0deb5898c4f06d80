"""Networks by what may be reached through them: the public Internet, this site's own, never.

From the special-purpose registries of IANA (RFC 6890 and what has been added since), not from
`ipaddress.is_global`, which differs between Python's versions. An address that carries another one
(mapped, translated, 6to4, Teredo) is judged by both.
"""

from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


def _networks(*names: str) -> tuple[Network, ...]:
    return tuple(ip_network(name) for name in names)


_NEVER = _networks(
    # "this network", which Linux takes for the host itself; link-local; multicast; reserved
    "0.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "240.0.0.0/4",
    "::/128", "fe80::/10", "ff00::/8",
    # what gives a cloud's machines their credentials, where it is not link-local
    "100.100.100.200/32", "168.63.129.16/32", "192.0.0.192/32", "fd00:ec2::254/128",
    "fd20:ce::254/128",
)  # fmt: skip
_PUBLIC_6 = ip_network("2000::/3")
_SPECIAL = _networks(
    "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24",
    "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
    "2001::/23", "2001:db8::/32", "3fff::/20",
)  # fmt: skip
_COMPATIBLE, _TRANSLATED = ip_network("::/96"), ip_network("64:ff9b::/96")


def parse_address(text: str) -> Address:
    """Return an address as the resolver gives it; a zone (`%eth0`) is no part of it."""
    return ip_address(text.partition("%")[0])


def is_never_reached(address: Address) -> bool:
    """Whether nobody may be sent there: link-local, metadata services, multicast, reserved."""
    return any(is_in(part, _NEVER) for part in _parts(address))


def is_public(address: Address) -> bool:
    """Whether it is an address of the public Internet and of nothing else."""
    return not is_never_reached(address) and all(_is_public(part) for part in _parts(address))


def is_in(address: Address, networks: Iterable[Network]) -> bool:
    """Whether one of the networks has the address."""
    return any(address.version == network.version and address in network for network in networks)


def plain(address: Address) -> Address:
    """Return the address that a socket would connect to: IPv4 for a mapped one."""
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def _is_public(address: Address) -> bool:
    if is_in(address, _SPECIAL):
        return False
    # of IPv6 one eighth is given out; what is translated is judged by what it carries
    return isinstance(address, IPv4Address) or is_in(address, (_PUBLIC_6, _TRANSLATED))


def _parts(address: Address) -> Iterator[Address]:
    """Yield an address, or what it is mapped from, and those that it carries."""
    address = plain(address)
    yield address
    if isinstance(address, IPv4Address):
        return
    if address.sixtofour is not None:
        yield address.sixtofour
    if address.teredo is not None:
        yield from address.teredo
    if is_in(address, (_COMPATIBLE, _TRANSLATED)) and int(address) > 1:
        yield IPv4Address(int(address) & 0xFFFFFFFF)
