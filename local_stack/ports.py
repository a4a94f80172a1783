"""TCP ports on this machine."""

import errno
import ipaddress
import socket

from local_stack.errors import StackError

PORT_IN_USE = "in use by another program"


def check_port_free(host: str, port: int) -> None:
    """Raises StackError, naming the port, where a server couldn't listen there."""
    problem = port_problem(host, port)
    if problem == PORT_IN_USE:
        raise StackError(f"port {port} on {host} is {problem}; choose another with --port")
    if problem is not None:
        raise StackError(f"can't listen on {host} port {port}: {problem}; choose others with --host and --port")


def port_problem(host: str, port: int) -> str | None:
    """Why a server couldn't listen there; None where it could."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the API's own socket: closed connections don't count
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        return PORT_IN_USE if error.errno == errno.EADDRINUSE else str(error)
    return None


def free_local_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def service_url(host: str, port: int) -> str:
    """The URL under which this machine reaches a server that listens on `host`."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{host_in_url(reachable)}:{port}"


def host_in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
