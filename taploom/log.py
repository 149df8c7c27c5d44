"""Logging: one line per event on standard error, for journald, launchd or a file to keep."""

from __future__ import annotations

import logging
import sys

LEVELS = ("debug", "info", "warning", "error")


class _Formatter(logging.Formatter):
    """`2026-11-21T22:31:05.123Z INFO agent_guest link: text`, always on one line.

    A peer's bytes may end up in a message: control characters are escaped so that they cannot forge a line or drive a
    terminal.
    """

    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self, component: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {component} %(short)s: %(message)s")
        import time

        self.converter = time.gmtime

    def format(self, record: logging.LogRecord) -> str:
        record.short = record.name.rpartition(".")[2]
        return super().format(record)

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = record.message.translate(_ESCAPES)
        return super().formatMessage(record)


_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), 127)}


def setup_logging(component: str, level: str = "info") -> None:
    """Sends the process's log records from `level` upwards to standard error.

    Args:
        component: what to call this process in its lines, such as ``agent_guest``.
        level: one of `LEVELS`.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(component))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
