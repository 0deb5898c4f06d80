"""Which addresses are public, and which are nobody's to reach."""

import pytest

from stratocache.cache.networks import is_never_reached, is_public, parse_address


@pytest.mark.parametrize(
    "text",
    ["8.8.8.8", "172.32.0.1", "172.15.255.255", "192.167.255.255", "100.128.0.1", "2606:4700::1111",
     "2a00:1450:4001::8a", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"],
)  # fmt: skip
def test_public_addresses_are_public(text: str) -> None:
    """An address of the Internet is public, also when it is mapped or translated."""
    assert is_public(parse_address(text))
    assert not is_never_reached(parse_address(text))


@pytest.mark.parametrize(
    "text",
    ["127.0.0.1", "127.255.255.254", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1",
     "100.64.0.1", "192.0.2.1", "198.18.0.1", "198.51.100.7", "203.0.113.9", "192.0.0.8",
     "::1", "fc00::1", "fdff::1", "fec0::1", "2001:db8::1", "2001:2::1", "100::1", "5f00::1",
     "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a00:1",
     "64:ff9b:1::1", "2002:7f00:1::", "2002:a00:1::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2",
     "4000::1"],
)  # fmt: skip
def test_special_addresses_are_not_public(text: str) -> None:
    """Loopback, private, documentation and benchmark addresses are not, however they are written."""
    assert not is_public(parse_address(text))
    assert not is_never_reached(parse_address(text))


@pytest.mark.parametrize(
    "text",
    ["0.0.0.0", "0.1.2.3", "169.254.169.254", "169.254.0.1", "224.0.0.1", "239.255.255.255",
     "240.0.0.1", "255.255.255.255", "::", "fe80::1", "fe80::1%eth0", "febf::1", "ff02::1",
     "::ffff:169.254.169.254", "::ffff:0.0.0.0", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1",
     "::169.254.169.254", "100.100.100.200", "168.63.129.16", "fd00:ec2::254"],
)  # fmt: skip
def test_some_addresses_are_never_reached(text: str) -> None:
    """Link-local and metadata addresses, multicast and "this host" are never reached by anybody."""
    assert is_never_reached(parse_address(text))
    assert not is_public(parse_address(text))
