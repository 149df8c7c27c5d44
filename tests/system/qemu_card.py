"""Stands for a VM: a TAP in this namespace whose frames go over a Unix socket, framed as by QEMU's `-netdev stream`.

    python qemu_card.py INTERFACE MAC connect|listen PATH

As QEMU with `server=off,reconnect=…` it connects again when the stream ends; with `listen`, as with `server=on`, it
waits for the next one to connect. Prints `up` whenever it is plugged in.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

_TUNSETIFF, _TAP_NO_PI = 0x400454CA, 0x1002  # linux/if_tun.h: IFF_TAP | IFF_NO_PI


def open_tap(name: str, mac: str) -> int:
    tap = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH", name.encode(), _TAP_NO_PI))
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    subprocess.run(["ip", "link", "set", name, "address", mac, "up"], check=True)
    return tap


def carry(tap: int, stream: socket.socket) -> None:
    """Moves frames both ways until the stream ends."""
    pending = b""
    while True:
        ready, _, _ = select.select([tap, stream], [], [])
        try:
            if tap in ready:
                frame = os.read(tap, 65600)
                stream.sendall(struct.pack(">I", len(frame)) + frame)
            if stream in ready:
                data = stream.recv(65536)
                if not data:
                    return
                pending += data
                while len(pending) >= 4 and len(pending) >= 4 + (size := int.from_bytes(pending[:4])):
                    os.write(tap, pending[4 : 4 + size])
                    pending = pending[4 + size :]
        except ConnectionError:
            return


def main() -> None:
    name, mac, how, path = sys.argv[1:]
    tap = open_tap(name, mac)
    listener = socket.socket(socket.AF_UNIX)
    if how == "listen":
        Path(path).unlink(missing_ok=True)
        listener.bind(path)
        listener.listen(1)
    while True:
        if how == "listen":
            stream, _ = listener.accept()
        else:
            stream = socket.socket(socket.AF_UNIX)
            try:
                stream.connect(path)
            except OSError:
                time.sleep(0.05)  # a redial's back-off
                continue
        print("up", flush=True)
        with stream:
            carry(tap, stream)


if __name__ == "__main__":
    main()
