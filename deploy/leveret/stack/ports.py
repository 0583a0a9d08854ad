"""Loopback ports for private servers."""

import random
import socket
from collections.abc import Collection

# Below the range from which the kernel takes ports for outgoing connections: a client that keeps
# calling a stopped server on a port of that range can end up connected to itself, and then holds the
# port when the server comes back. Also below 30000-32767, which Kubernetes gives to services.
PORTS = range(20_000, 30_000)

ATTEMPTS = 200


def is_free(port: int) -> bool:
    """Tell whether a server could listen on this TCP port of 127.0.0.1 now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_port(taken: Collection[int] = ()) -> int:
    """Return a port nobody listens on, and none of `taken`.

    The choice is random, so two runs that choose at once seldom choose the same; a server that still
    loses the race is started again on another port. Raises OSError when nothing is free.
    """
    for _ in range(ATTEMPTS):
        port = random.choice(PORTS)
        if port not in taken and is_free(port):
            return port
    raise OSError(f"no free port between {PORTS.start} and {PORTS.stop} on 127.0.0.1")


def is_listening(port: int, timeout_s: float = 1.0) -> bool:
    """Tell whether something accepts connections on this port of 127.0.0.1."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=timeout_s):
            return True
    except OSError:
        return False
