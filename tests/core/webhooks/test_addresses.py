import socket
from ipaddress import ip_address
from typing import Any

import pytest

from core.webhooks import addresses
from core.webhooks.addresses import MAX_URL_LENGTH, Target, UrlRefused, is_public, parse_target, public_addresses

HOOKS = Target("https", "hooks.example.com", 443, b"/")


def resolving_to(monkeypatch: pytest.MonkeyPatch, *found: str) -> list[str]:
    """Every name has these addresses. Returns the names that are looked up."""
    asked: list[str] = []

    def getaddrinfo(host: str, port: int, **options: Any) -> list[Any]:
        asked.append(host)
        return [(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    monkeypatch.setattr(addresses.socket, "getaddrinfo", getaddrinfo)
    return asked


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("https://hooks.example.com", Target("https", "hooks.example.com", 443, b"/")),
        ("https://HOOKS.example.com:8443/a b?c=d&e", Target("https", "hooks.example.com", 8443, b"/a%20b?c=d&e")),
        ("https://bücher.example/", Target("https", "xn--bcher-kva.example", 443, b"/")),
        ("https://8.8.8.8/", Target("https", "8.8.8.8", 443, b"/")),
        ("https://[2606:4700::1111]/", Target("https", "2606:4700::1111", 443, b"/")),
        ("https://intern_al-1.example/", Target("https", "intern_al-1.example", 443, b"/")),
    ],
)
def test_urls_that_webhooks_may_go_to(url: str, target: Target) -> None:
    assert parse_target(url, allow_insecure=False) == target


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://hooks.example.com/", "https://"),
        ("ftp://hooks.example.com/", "https://"),
        ("file:///etc/passwd", "https://"),
        ("hooks.example.com", "https://"),
        ("", "https://"),
        ("https:///path", "host name"),
        ("https://", "host name"),
        ("https://user@hooks.example.com/", "user name or password"),
        ("https://user:password@hooks.example.com/", "user name or password"),
        ("https://hooks.example.com@127.0.0.1/", "user name or password"),
        ("https://hooks.example.com/#x", "fragment"),
        ("https://hooks.example.com:0/", "port"),
        ("https://hooks.example.com:70000/", "port"),
        ("https://hooks.example.com:x/", "not a URL"),
        ("https://hooks.example.com/\n", "not a URL"),
        ("https://hooks example.com/", "host name"),
        ("https://hooks.example.com\\@127.0.0.1/", "(host name|user name)"),
        ("https://h%6foks.example.com/", "host name"),
        ("https://-hooks.example.com/", "host name"),
        ("https://hooks..example.com/", "host name"),
        ("https://" + "a" * 64 + ".example.com/", "(host name|not a URL)"),
        ("https://hooks.example.com/" + "a" * MAX_URL_LENGTH, "longer than 2048"),
        ("https://127.0.0.1/", "not a public one"),
        ("https://10.1.2.3/", "not a public one"),
        ("https://169.254.169.254/latest/meta-data", "not a public one"),
        ("https://[::1]/", "not a public one"),
        ("https://[::ffff:127.0.0.1]/", "not a public one"),
        ("https://[fe80::1%25eth0]/", "(not a public one|host name)"),
        ("https://localhost/", "this machine"),
        ("https://LOCALHOST:8000/", "this machine"),
        ("https://a.localhost/", "this machine"),
        ("https://127.1/", "host name"),
        ("https://2130706433/", "host name"),
        ("https://0x7f.0.0.1/", "host name"),
        ("https://0x7f000001/", "host name"),
        ("https://0177.0.0.1/", "not a URL"),
        ("https://1.2.3.4.5/", "host name"),
        ("https://a.0x/", "host name"),
    ],
)
def test_urls_that_they_may_not_go_to(url: str, reason: str) -> None:
    with pytest.raises(UrlRefused, match=reason):
        parse_target(url, allow_insecure=False)


@pytest.mark.parametrize("url", ["http://hooks.example.com/", "http://127.0.0.1:9000/", "https://localhost/", "http://[::1]:9/"])
def test_setting_allows_what_is_insecure(url: str) -> None:
    assert parse_target(url, allow_insecure=True).port in (80, 443, 9000, 9)


@pytest.mark.parametrize("url", ["ftp://a/", "http://user@a/", "http://127.1/", "http:///x", "http://a/#b"])
def test_setting_allows_nothing_else(url: str) -> None:
    with pytest.raises(UrlRefused):
        parse_target(url, allow_insecure=True)


PRIVATE = {
    "loopback": ["127.0.0.1", "127.255.255.254", "::1"],
    "private": ["10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.0.1", "fc00::1", "fd00:ec2::254"],
    "link-local": ["169.254.0.1", "169.254.169.254", "fe80::1", "fe80::1%eth0"],
    "carrier-grade NAT": ["100.64.0.1", "100.127.255.255"],
    "unspecified and this network": ["0.0.0.0", "0.1.2.3", "::"],
    "multicast": ["224.0.0.1", "239.255.255.255", "ff02::1", "ff0e::1"],
    "broadcast and reserved": ["255.255.255.255", "240.0.0.1", "4000::1", "100::1", "5f00::1"],
    "documentation and benchmarks": ["192.0.2.1", "198.51.100.1", "203.0.113.1", "198.18.0.1", "2001:db8::1", "3fff::1"],
    "the host of an Azure machine": ["168.63.129.16"],
    "protocol assignments": ["192.0.0.8", "192.0.0.9", "192.88.99.1", "2001:20::1"],
    "IPv4-mapped": ["::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254"],
    "IPv4-compatible": ["::127.0.0.1", "::10.0.0.1"],
    "6to4": ["2002:7f00:1::", "2002:a00:1::1", "2002:808:808::1"],
    "Teredo": ["2001:0:4136:e378:8000:63bf:3fff:fdd2"],
    "NAT64": ["64:ff9b::7f00:1", "64:ff9b::10.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1"],
    "site-local": ["fec0::1"],
}


@pytest.mark.parametrize(("kind", "address"), [(kind, address) for kind, found in PRIVATE.items() for address in found])
def test_addresses_that_are_not_public(kind: str, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_public(ip_address(address)), kind
    resolving_to(monkeypatch, address)
    with pytest.raises(UrlRefused, match="not a public one") as caught:
        public_addresses(HOOKS, allow_insecure=False)
    assert address not in str(caught.value)  # a user must not learn what names mean in this network


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "100.128.0.1", "2606:4700::1111", "2a00:1450::1", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8"])
def test_public_addresses(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_public(ip_address(address))
    asked = resolving_to(monkeypatch, address)
    assert public_addresses(HOOKS, allow_insecure=False) == [ip_address(address)]
    assert asked == ["hooks.example.com"]


def test_all_addresses_have_to_be_public(monkeypatch: pytest.MonkeyPatch) -> None:
    resolving_to(monkeypatch, "8.8.8.8", "10.0.0.1")
    with pytest.raises(UrlRefused, match="not a public one"):
        public_addresses(HOOKS, allow_insecure=False)
    assert public_addresses(HOOKS, allow_insecure=True) == [ip_address("8.8.8.8"), ip_address("10.0.0.1")]


def test_failed_lookup_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    resolving_to(monkeypatch)
    with pytest.raises(UrlRefused, match="no address"):
        public_addresses(HOOKS, allow_insecure=True)

    def fails(*arguments: Any, **options: Any) -> list[Any]:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(addresses.socket, "getaddrinfo", fails)
    with pytest.raises(UrlRefused, match="no address"):
        public_addresses(HOOKS, allow_insecure=True)
