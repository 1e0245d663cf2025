"""Ports for processes that have to be told one beforehand."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack, suppress

# Below those that the kernel gives to connections (ip_local_port_range): one of them could take a port between our
# look and the listener's.
_LOW, _HIGH = 10_000, 32_000


def free_ports(count: int) -> list[int]:
    """So many ports of the loopback that nobody has at the moment."""
    with ExitStack() as stack:
        found: list[int] = []
        while len(found) < count:
            port = random.SystemRandom().randrange(_LOW, _HIGH)  # tests that are seeded do not choose the same
            with suppress(OSError):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
                found.append(port)
        return found


def free_port() -> int:
    """One of them."""
    return free_ports(1)[0]
