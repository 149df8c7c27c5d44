"""Tells systemd, or the images' init, that a service is ready (sd_notify(3)): one datagram, no library."""

from __future__ import annotations

import logging
import os
import socket

logger = logging.getLogger("taploom.notify")


def notify_ready() -> None:
    """Sends READY=1 to $NOTIFY_SOCKET; does nothing where there is none. Never fails: readiness is only told."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            # A leading @ stands for the NUL of an abstract socket (unix(7)).
            sock.sendto(b"READY=1", "\0" + path[1:] if path[0] == "@" else path)
    except OSError as error:
        logger.warning("cannot tell the service manager that the service is ready: %s", error)
