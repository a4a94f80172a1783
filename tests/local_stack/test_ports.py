import socket

import pytest

from local_stack.errors import StackError
from local_stack.ports import PORT_IN_USE, check_port_free, free_local_port, host_in_url, is_loopback, port_problem, service_url


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StackError, match=rf"port {port} on 127\.0\.0\.1 is in use.*--port"):
            check_port_free("127.0.0.1", port)
        assert port_problem("127.0.0.1", port) == PORT_IN_USE
        with pytest.raises(StackError, match=f"port {port}"):
            check_port_free("0.0.0.0", port)
    check_port_free("127.0.0.1", port)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "203.0.113.7"])
def test_an_address_that_is_not_this_machines_is_an_error(host: str) -> None:
    with pytest.raises(StackError, match=f"can't listen on {host} port 8000"):
        check_port_free(host, 8000)


def test_a_free_port_can_be_listened_on() -> None:
    check_port_free("127.0.0.1", free_local_port())


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("fd00::1", "http://[fd00::1]:80"),
        ("box", "http://box:80"),
    ],
)
def test_the_url_reaches_what_listens_there(host: str, url: str) -> None:
    assert service_url(host, 80) == url


def test_addresses_of_this_machine_alone() -> None:
    assert [host for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost", "0.0.0.0", "::", "192.0.2.1", "box", "") if is_loopback(host)] == [
        "127.0.0.1",
        "127.0.0.2",
        "::1",
        "localhost",
    ]


def test_only_ipv6_addresses_have_brackets_in_a_url() -> None:
    assert [host_in_url(host) for host in ("::1", "127.0.0.1", "box")] == ["[::1]", "127.0.0.1", "box"]
