"""Where webhooks may go: to public addresses, by https.

A URL comes from a user, and is asked for by processes that reach more than the user does: databases, inference servers, a
cloud's metadata. So its host is looked up once, every address that it has must be public, and the connection goes to the
address that was looked at (core.webhooks.sending): a name can't be public when it is checked and private when it is used.
"""

import re
import socket
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

import httpx2

Address = IPv4Address | IPv6Address

MAX_URL_LENGTH = 2048
DEFAULT_PORTS = {"https": 443, "http": 80}
HOST_NAME = re.compile(r"(?=.{1,253}\Z)[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?)*")
NUMBER = re.compile(r"(.*\.)?(0x[0-9a-f]*|[0-9]+)")
"""A host that ends in one is an IPv4 address to some resolvers, in forms such as 127.1 and 0x7f.1."""

REFUSED_V4 = (IPv4Network("192.0.0.0/24"), IPv4Network("192.88.99.0/24"), IPv4Network("168.63.129.16/32"))
"""Protocol assignments and relays of 6to4, part of which `is_global` calls public, and the host's own service on Azure's machines."""
GLOBAL_UNICAST = IPv6Network("2000::/3")
REFUSED_V6 = (IPv6Network("2001::/23"), IPv6Network("2001:db8::/32"), IPv6Network("2002::/16"), IPv6Network("3fff::/20"))
"""Tunnels to IPv4 (Teredo, 6to4), protocol assignments and documentation."""
NAT64 = IPv6Network("64:ff9b::/96")


class UrlRefused(Exception):
    """No webhook is sent to this URL. Carries why, for its owner; never an address that a name was found to have."""


@dataclass(frozen=True)
class Target:
    """A URL that webhooks may be sent to, as far as it says so itself. `host` is ASCII; `path` holds the query too."""

    scheme: str
    host: str
    port: int
    path: bytes

    @property
    def has_default_port(self) -> bool:
        return self.port == DEFAULT_PORTS[self.scheme]


def parse_target(url: str, *, allow_insecure: bool) -> Target:
    """`allow_insecure`: http and addresses that are not public, too. Raises UrlRefused."""
    if len(url) > MAX_URL_LENGTH:
        raise UrlRefused(f"the URL is longer than {MAX_URL_LENGTH} characters")
    try:
        parsed = httpx2.URL(url)
        host = parsed.raw_host.decode("ascii").lower()
    except (httpx2.InvalidURL, ValueError) as error:
        raise UrlRefused(f"this is not a URL: {error}") from error
    if parsed.scheme not in ("https", "http"):
        raise UrlRefused("the URL must begin with https://")
    if parsed.scheme == "http" and not allow_insecure:
        raise UrlRefused("the URL must begin with https://, so that nobody else reads or answers what is sent there")
    if parsed.userinfo:
        raise UrlRefused("the URL must not hold a user name or password")
    if parsed.fragment:
        raise UrlRefused("the URL must not have a fragment (#…)")
    port = parsed.port if parsed.port is not None else DEFAULT_PORTS[parsed.scheme]
    if not 1 <= port <= 65_535:
        raise UrlRefused("the URL's port must be between 1 and 65535")
    _check_host(host, allow_insecure)
    return Target(parsed.scheme, host, port, parsed.raw_path)


def _check_host(host: str, allow_insecure: bool) -> None:
    address = _literal(host)
    if address is None and (not HOST_NAME.fullmatch(host) or NUMBER.fullmatch(host)):
        raise UrlRefused("the URL has no valid host name")
    if allow_insecure:
        return
    if host == "localhost" or host.endswith(".localhost"):
        raise UrlRefused("the URL must not name this machine")
    if address is not None and not is_public(address):
        raise UrlRefused("the URL's address is not a public one")


def public_addresses(target: Target, *, allow_insecure: bool) -> list[Address]:
    """The addresses of the target's host, looked up now, all of which are public. Raises UrlRefused, also where the lookup fails."""
    try:
        found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UrlRefused("the URL's host has no address that can be found") from error
    addresses = list(dict.fromkeys(ip_address(entry[4][0]) for entry in found))
    if not addresses:
        raise UrlRefused("the URL's host has no address that can be found")
    if not allow_insecure and not all(is_public(address) for address in addresses):
        raise UrlRefused("the URL's host has an address that is not a public one")
    return addresses


def is_public(address: Address) -> bool:
    """Whether it belongs to the public internet, and so does any IPv4 address that it stands for."""
    if isinstance(address, IPv4Address):
        return address.is_global and not address.is_multicast and not any(address in network for network in REFUSED_V4)
    if address.ipv4_mapped is not None:
        return is_public(address.ipv4_mapped)
    if address in NAT64:
        return is_public(IPv4Address(int(address) & 0xFFFF_FFFF))
    return address in GLOBAL_UNICAST and address.is_global and not any(address in network for network in REFUSED_V6)


def _literal(host: str) -> Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None
