"""Which network interface leads to a host, and how fast its link is. Linux."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
from typing import NamedTuple

_SIOCGIFADDR = 0x8915  # linux/sockios.h: the IPv4 address of an interface


class Interface(NamedTuple):
    name: str  # "?" where it cannot be told
    address: str
    megabits: int  # of its link, in Mb/s; 0 where the kernel does not say: virtual ones

    def __str__(self) -> str:
        link = f"{self.megabits / 1000:g} Gb/s" if self.megabits else "link speed unknown"
        return f"{self.name} {self.address} ({link})"


def towards(host: str) -> Interface:
    """The interface by which this machine reaches `host`. Nothing is sent."""
    try:
        family, *_, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # of a datagram: the kernel picks the route
            own = probe.getsockname()[0]
    except OSError:
        return Interface("?", host, 0)
    name = next((name for _, name in socket.if_nameindex() if _address(name) == own), "?")
    if own.startswith("127."):
        name = "lo"
    return Interface(name, own, link_megabits(name))


def link_megabits(name: str) -> int:
    with contextlib.suppress(OSError, ValueError), open(f"/sys/class/net/{name}/speed") as file:
        return max(int(file.read()), 0)  # -1: no link, or none that has a speed
    return 0


def _address(name: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            asked = struct.pack("256s", name.encode()[:15])
            return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, asked)[20:24])
        except OSError:
            return None  # it has none
