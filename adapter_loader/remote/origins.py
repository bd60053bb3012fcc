"""Which servers may be asked: origins that the operator has named, and public addresses.

A server that fetches what its clients name can be made to ask machines that only it can reach
(OWASP, "Server-Side Request Forgery"). So an origin that nobody has named is asked over TLS only,
and at addresses that all the world can reach. The address that was checked is the one that is
connected to, since a second look-up may give another.
"""

import ipaddress
import socket
from typing import NamedTuple
from urllib.parse import SplitResult, urlsplit

from adapter_loader.refusals import forbidden
from adapter_loader.remote.retries import Interrupted

DEFAULT_PORTS = {"http": 80, "https": 443}
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: the last 32 bits are an IPv4 address


class Origin(NamedTuple):
    """Scheme, host and port of a URL (RFC 6454)."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == DEFAULT_PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{host}{port}"


def origin_of(url: str) -> Origin:
    """Raises ValueError for what is not an absolute http(s) URL."""
    parts: SplitResult = urlsplit(url)
    if parts.scheme not in DEFAULT_PORTS or not parts.hostname or "@" in parts.netloc:
        raise ValueError("not an http or https URL of a host")
    return Origin(parts.scheme, parts.hostname, parts.port or DEFAULT_PORTS[parts.scheme])


def named_origin(text: str) -> Origin:
    """`host`, `host:port` or `http://host:port`; https unless it says otherwise.

    Raises ValueError for anything else.
    """
    url = text if "://" in text else f"https://{text}"
    origin = origin_of(url)
    parts = urlsplit(url)
    if parts.path.strip("/") or parts.query or parts.fragment:
        raise ValueError("it has more than a scheme, a host and a port")
    return origin


def addresses_of(origin: Origin) -> list[str]:
    """IP addresses, in the order to try them. Raises Interrupted when there are none."""
    try:
        found = socket.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise Interrupted(f"the host {origin.host} cannot be found") from error
    return list(dict.fromkeys(str(place[0]) for _, _, _, _, place in found))


def public_addresses(origin: Origin) -> list[str]:
    """Where an origin that nobody has named is asked. Raises RequestError or Interrupted."""
    if origin.scheme != "https":
        raise forbidden(f"it leads to {origin}, which this server does not ask without TLS")
    addresses = addresses_of(origin)
    if not all(is_public(address) for address in addresses):
        raise forbidden(f"it leads to {origin.host}, which is not a public address")
    return addresses


def is_public(address: str) -> bool:
    """Whether all the world can reach it, also as the IPv4 address that it stands for."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        inner = parsed.ipv4_mapped or parsed.sixtofour
        if parsed in NAT64:
            inner = ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return parsed.is_global and not parsed.is_multicast
