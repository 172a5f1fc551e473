"""Hosts on one machine: network namespaces with addresses of their own on a bridge. Needs root."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest


class Hosts:
    """host k has address(k); its link can be cut and put back. Everything ends with the context."""

    def __init__(self, count: int = 4) -> None:
        self.count = count
        self.tag = f"a{os.getpid() % 100000}"
        self.subnet = f"10.{77 + os.getpid() % 100}.{os.getpid() // 100 % 250}"

    def __enter__(self) -> Hosts:
        if os.geteuid() != 0 or not shutil.which("ip"):
            pytest.skip("network namespaces need root and iproute2")
        if _ip("link", "add", f"{self.tag}br", "type", "bridge", check=False):
            pytest.skip("this machine lets nobody make a bridge")
        _ip("link", "set", f"{self.tag}br", "up")
        for k in range(self.count):
            name, link = self.name(k), self.link(k)
            if _ip("netns", "add", name, check=False):
                self.__exit__()
                pytest.skip("this machine lets nobody make network namespaces")
            _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", link, "master", f"{self.tag}br", "up")
            _ip("-n", name, "addr", "add", f"{self.address(k)}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for k in range(self.count):
            _ip("netns", "del", self.name(k), check=False)
        _ip("link", "del", f"{self.tag}br", check=False)

    def name(self, k: int) -> str:
        return f"{self.tag}h{k}"

    def link(self, k: int) -> str:
        return f"{self.tag}v{k}"

    def address(self, k: int) -> str:
        return f"{self.subnet}.{10 + k}"

    def prefix(self, k: int) -> list[str]:
        """What stands before a command to run it on host k."""
        return ["ip", "netns", "exec", self.name(k)]

    def cut(self, k: int) -> None:
        _ip("link", "set", self.link(k), "down")

    def mend(self, k: int) -> None:
        _ip("link", "set", self.link(k), "up")


def _ip(*arguments: str, check: bool = True) -> int:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done.returncode
