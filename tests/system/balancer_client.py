"""Connects to `balancer_server.py` and says who answered.

    python balancer_client.py ADDRESS PORT tcp|udp COUNT

Asks eight times at once. Prints a JSON object: for each answer, or the name of the error instead, how often.
"""

from __future__ import annotations

import collections
import json
import socket
import sys
import threading

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


def ask_often(address: str, port: int, protocol: str, count: int) -> list[str]:
    # With what a guest's image has of Python's library, too: threading, but not concurrent.futures.
    todo, answers = iter(range(count)), list[str]()

    def ask_on() -> None:
        for _ in todo:
            answers.append(ask(address, port, protocol))

    threads = [threading.Thread(target=ask_on) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


if __name__ == "__main__":
    print(json.dumps(collections.Counter(ask_often(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])))))
