from __future__ import annotations

import errno
import socket
import threading
from typing import Any

import psutil
import pytest

from launcher.cluster import network
from launcher.errors import ClusterError


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return int(found.getsockname()[1])


@pytest.mark.parametrize(
    ("host", "here"),
    [
        (socket.gethostname(), True),
        ("127.0.0.1", True),
        ("192.0.2.1", False),
        ("no-such-host.invalid", False),
    ],
)
def test_this_host_knows_its_names(host: str, here: bool) -> None:
    assert network.is_here(host) is here


def test_the_way_to_oneself_is_the_interface_with_that_address() -> None:
    own = {
        address.address: name
        for name, found in psutil.net_if_addrs().items()
        for address in found
        if address.family == socket.AF_INET
    }
    for address, name in own.items():
        assert network.interface_to(address) == (None if address.startswith("127.") else name)


def test_there_is_no_way_to_a_name_that_nobody_has() -> None:
    assert network.interface_to("no-such-host.invalid") is None


def test_a_door_lets_everybody_in_until_it_is_closed() -> None:
    port = free_port()
    assert not network.answers("127.0.0.1", port)
    with network.Door(port):
        assert all(network.answers("127.0.0.1", port) for _ in range(3))
        with pytest.raises(ClusterError, match=f"port {port}, the one behind submit.port, cannot be used"):
            network.Door(port)
    assert not network.answers("127.0.0.1", port)


def test_a_visitor_who_fails_does_not_close_the_door(monkeypatch: pytest.MonkeyPatch) -> None:
    met = threading.Event()
    accept = socket.socket.accept

    def once_in_vain(listening: socket.socket) -> Any:
        visitor = accept(listening)
        if not met.is_set():
            met.set()
            visitor[0].close()
            raise OSError(errno.EMFILE, "Too many open files")
        return visitor

    monkeypatch.setattr(socket.socket, "accept", once_in_vain)
    with network.Door(port := free_port()):
        for _ in range(2):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as visitor:
                assert visitor.recv(1) == b""  # shown out; who waits in the queue is not
        assert met.is_set()
