"""The way from this host to another: the interface that leads there, and whether somebody answers."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any

import psutil

from launcher.errors import ClusterError

_PATIENCE_S = 2.0
_BACKLOG = 1024
_LOOK_S = 0.1
_ANY_PORT = 9  # nothing is sent there: a datagram socket only looks up its route


def interface_to(host: str) -> str | None:
    """Return the interface that leads to `host`; None where there is none, or only the loopback one."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, _ANY_PORT, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as way:
            way.connect(address)
            mine = way.getsockname()[0]
    except OSError:
        return None
    names = (name for name, found in psutil.net_if_addrs().items() if mine in _bare(found))
    return next((name for name in names if not _is_loopback(name)), None)


def is_here(host: str) -> bool:
    """Tell whether `host` is a name or an address of the machine we run on."""
    if host in (socket.gethostname(), socket.gethostname().partition(".")[0]):
        return True
    own = {address for found in psutil.net_if_addrs().values() for address in _bare(found)}
    try:
        return any(found[4][0] in own for found in socket.getaddrinfo(host, None))
    except OSError:
        return False


def answers(host: str, port: int) -> bool:
    """Tell whether somebody accepts a connection there."""
    with suppress(OSError), socket.create_connection((host, port), timeout=_PATIENCE_S):
        return True
    return False


class Door:
    """A port that accepts everybody and says nothing: who gets in knows that the way to this host is open."""

    def __init__(self, port: int) -> None:
        self._closed = threading.Event()
        try:
            self._socket = _listen(port)
        except OSError as error:
            raise ClusterError(
                f"port {port}, the one behind submit.port, cannot be used on this host ({error.strerror}); choose "
                "another submit.port"
            ) from error
        threading.Thread(target=self._greet, daemon=True).start()

    def __enter__(self) -> Door:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes who waits in accept
        self._socket.close()

    def _greet(self) -> None:
        while not self._closed.is_set():
            try:
                visitor, _ = self._socket.accept()
                visitor.close()
            except OSError:
                # Of one visitor who has gone again, or for want of descriptors: the next one may come.
                self._closed.wait(_LOOK_S)


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        with suppress(OSError):  # IPv6 may be compiled in and switched off
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG
            )
    return socket.create_server(("", port), backlog=_BACKLOG)


def _bare(found: Iterable[Any]) -> set[str]:
    """Return the addresses of an interface, without the name that psutil puts behind those of one link."""
    return {address.address.partition("%")[0] for address in found}


def _is_loopback(name: str) -> bool:
    return name in ("lo", "lo0")
