"""Runs in a guest: prints the sizes and digests of the frames of one TCP port, in both directions, as JSON, sorted. It
ends with a datagram for another port.

usage: sniff_frames.py INTERFACE PORT END
"""

import hashlib
import json
import socket
import sys

ETH_P_ALL, SO_RCVBUFFORCE = 3, 33
ETH_P_IP, ETH_P_IPV6 = 0x0800, 0x86DD
port, end = int(sys.argv[2]), int(sys.argv[3])
sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
sniffer.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
sniffer.bind((sys.argv[1], ETH_P_ALL))
print("ready", flush=True)
found = []
while True:
    frame = sniffer.recv(1 << 17)
    kind = int.from_bytes(frame[12:14], "big")
    if kind not in (ETH_P_IP, ETH_P_IPV6):
        continue
    protocol, transport = (frame[23], 34) if kind == ETH_P_IP else (frame[20], 54)
    ports = {int.from_bytes(frame[at : at + 2], "big") for at in (transport, transport + 2)}
    if protocol == socket.IPPROTO_UDP and end in ports:
        break
    if protocol == socket.IPPROTO_TCP and port in ports:
        found.append([len(frame), hashlib.sha256(frame).hexdigest()])
print(json.dumps(sorted(found)))
