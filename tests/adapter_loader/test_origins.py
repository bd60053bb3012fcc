"""Which servers may be asked."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter_loader.remote.origins import Origin, is_public, named_origin, public_addresses
from pipeline.errors import RequestError


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("models.org", Origin("https", "models.org", 443)),
        ("Models.org:8443", Origin("https", "models.org", 8443)),
        ("http://10.0.0.1:80/", Origin("http", "10.0.0.1", 80)),
        ("https://[::1]:99", Origin("https", "::1", 99)),
    ],
)
def test_a_host_is_named_with_or_without_scheme_and_port(text: str, origin: Origin) -> None:
    assert named_origin(text) == origin
    assert named_origin(str(origin)) == origin


@pytest.mark.parametrize(
    "text", ["", "ftp://x", "http://", "x/path", "x?q", "u:p@x", "x:port", "x:70000", "[::1"]
)
def test_anything_else_is_no_host(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        named_origin(text)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.0.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "::1",
        "::",
        "fe80::1%eth0",
        "fd00::1",
        "ff02::1",
        "2002:7f00:1::",
    ],
)
def test_addresses_inside_are_not_public(address: str) -> None:
    assert not is_public(address)


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_in_ipv6_clothes_is_what_it_is(address: object) -> None:
    for form in (f"::ffff:{address}", f"64:ff9b::{address}"):
        assert is_public(form) == is_public(str(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111"])
def test_what_all_the_world_can_reach_is_public(address: str) -> None:
    assert is_public(address)
    assert public_addresses(Origin("https", address, 443)) == [address]
    with pytest.raises(RequestError, match="without TLS"):
        public_addresses(Origin("http", address, 80))
