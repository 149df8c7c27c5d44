"""Connects to `balancer_server.py` and says who answered.

    python balancer_client.py ADDRESS PORT tcp|udp COUNT

Asks eight times at once. Prints a JSON object: for each answer, or the name of the error instead, how often.
"""

from __future__ import annotations

import collections
import json
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

TIMEOUT = 3.0


def ask(address: str, port: int, protocol: str) -> str:
    kind = socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM
    family, _, _, _, place = socket.getaddrinfo(address, port, type=kind)[0]
    with socket.socket(family, kind) as sock:
        sock.settimeout(TIMEOUT)
        try:
            sock.connect(place)
            if protocol == "udp":
                sock.send(b"?")
            return sock.recv(1000).decode().strip() or "nothing"
        except OSError as error:
            return type(error).__name__


if __name__ == "__main__":
    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(ask, sys.argv[1], int(sys.argv[2]), sys.argv[3]) for _ in range(int(sys.argv[4]))]
    print(json.dumps(collections.Counter(one.result() for one in asked)))
