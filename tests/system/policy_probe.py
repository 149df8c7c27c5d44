"""Runs in a guest: listens on ports, and tries many connections at once. Speaks JSON lines on its standard streams.

Started with a list of ports. Then each line of input is {"round": N, "probes": [[protocol, address, port], ...]} and is
answered by a list of booleans: which of the probes were answered. Every probe is a new connection.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import selectors
import socket
import struct
import sys
import threading
import time

# How long each attempt waits, in seconds. An answer that was not there is asked for again, with more patience: a
# datagram may be lost where the machine is busy.
ATTEMPTS = (0.3, 0.6, 1.2)


def serve(ports: list[int]) -> None:
    selector = selectors.DefaultSelector()
    for port in ports:
        tcp = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=256)
        udp = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        udp.bind(("::", port))
        for sock in (tcp, udp):
            sock.setblocking(False)
            selector.register(sock, selectors.EVENT_READ)

    def run() -> None:
        while True:
            for key, _ in selector.select():
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                try:
                    if sock.type == socket.SOCK_STREAM:
                        sock.accept()[0].close()
                    else:
                        data, peer = sock.recvfrom(2048)
                        sock.sendto(data, peer)
                except OSError:
                    continue

    threading.Thread(target=run, daemon=True).start()


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


class Pings:
    """Echo requests with identifiers of our own, by raw sockets: a flow each."""

    def __init__(self) -> None:
        self.v4 = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        self.v6 = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
        self._next = int.from_bytes(os.urandom(2), "big")

    def send(self, address: str) -> int:
        self._next = (self._next + 1) & 0xFFFF
        if ":" in address:
            self.v6.sendto(struct.pack("!BBHHH", 128, 0, 0, self._next, 1), (address, 0))
        else:
            packet = struct.pack("!BBHHH", 8, 0, 0, self._next, 1)
            packet = struct.pack("!BBHHH", 8, 0, checksum(packet), self._next, 1)
            self.v4.sendto(packet, (address, 0))
        return self._next

    def answered(self) -> list[tuple[int, str]]:
        found = []
        for sock in (self.v4, self.v6):
            while select.select([sock], [], [], 0)[0]:
                data, peer = sock.recvfrom(2048)
                body = data[20:] if sock is self.v4 else data
                if body[0] in (0, 129):
                    found.append((struct.unpack_from("!H", body, 4)[0], peer[0]))
        return found


def probe(probes: list[tuple[str, str, int]]) -> list[bool]:
    answers = [False] * len(probes)
    for timeout in ATTEMPTS:
        todo = [number for number, answer in enumerate(answers) if not answer]
        if not todo:
            break
        for number in attempt(probes, todo, timeout):
            answers[number] = True
    return answers


def attempt(probes: list[tuple[str, str, int]], todo: list[int], timeout: float) -> set[int]:
    answered: set[int] = set()
    poll = select.poll()
    sockets: dict[int, tuple[int, socket.socket]] = {}
    pings, pending = Pings(), {}
    poll.register(pings.v4, select.POLLIN)
    poll.register(pings.v6, select.POLLIN)
    for number in todo:
        protocol, address, port = probes[number]
        if protocol == "icmp":
            with contextlib.suppress(OSError):  # there is no route
                pending[pings.send(address), address] = number
            continue
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM)
        sock.setblocking(False)
        error = sock.connect_ex((address, port))
        if error not in (0, errno.EINPROGRESS):
            sock.close()
            continue
        if protocol == "udp":
            sock.send(b"probe")
        sockets[sock.fileno()] = number, sock
        poll.register(sock, select.POLLIN if protocol == "udp" else select.POLLOUT)
    deadline = time.monotonic() + timeout
    while (sockets or pending) and (left := deadline - time.monotonic()) > 0:
        for fd, _ in poll.poll(left * 1000):
            if fd not in sockets:
                for key in pings.answered():
                    if key in pending:
                        answered.add(pending.pop(key))
                continue
            number, sock = sockets.pop(fd)
            poll.unregister(fd)
            if probes[number][0] == "udp":
                try:
                    sock.recv(2048)
                    answered.add(number)
                except OSError:
                    pass
            elif sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                answered.add(number)
            sock.close()
    for _, sock in sockets.values():
        sock.close()
    pings.v4.close()
    pings.v6.close()
    return answered


def main() -> None:
    serve(json.loads(sys.argv[1]))
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(probe([tuple(one) for one in json.loads(line)])), flush=True)


main()
