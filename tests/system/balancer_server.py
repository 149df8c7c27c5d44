"""Answers, over TCP and UDP and both families, with a name and where the question came from.

    python balancer_server.py NAME PORT ECHO

At PORT, a TCP connection gets `NAME ADDRESS`; at ECHO, only what it sends. Each datagram is answered by `NAME ADDRESS`.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading


def main(name: str, greeting: int, echoing: int) -> None:
    for port in (greeting, echoing):
        server = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128)
        threading.Thread(target=accept, args=(server, name if port == greeting else "")).start()
        datagrams = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        datagrams.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # So that the answer comes from where the question went.
        datagrams.bind(("::", port))
        threading.Thread(target=answer, args=(datagrams, name)).start()
    print("ready", flush=True)


def accept(server: socket.socket, name: str) -> None:
    while True:
        connection, peer = server.accept()
        threading.Thread(
            target=echo, args=(connection, f"{name} {shown(peer[0])}\n" if name else ""), daemon=True
        ).start()


def echo(connection: socket.socket, greeting: str) -> None:
    with connection, contextlib.suppress(OSError):
        connection.sendall(greeting.encode())
        while data := connection.recv(65536):
            connection.sendall(data)


def answer(datagrams: socket.socket, name: str) -> None:
    while True:
        with contextlib.suppress(OSError):
            _, peer = datagrams.recvfrom(65536)
            datagrams.sendto(f"{name} {shown(peer[0])}\n".encode(), peer)


def shown(address: str) -> str:
    return address.removeprefix("::ffff:")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
