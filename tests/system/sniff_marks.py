"""Runs in a guest: prints the mark of every frame that arrives on an interface, in any encapsulation.

usage: sniff_marks.py INTERFACE
"""

import re
import socket
import sys

ETH_P_ALL = 3
sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
sniffer.bind((sys.argv[1], ETH_P_ALL))
print("ready", flush=True)
while True:
    frame, (_, _, kind, *_) = sniffer.recvfrom(65536)
    if kind == socket.PACKET_OUTGOING:
        continue
    for mark in re.findall(rb"MARK<([a-z0-9 .-]+)>", frame):
        print(mark.decode(), flush=True)
