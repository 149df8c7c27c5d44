"""Keeps OpenSSL out of the agent's process: 5 MB of 35, and nothing in it is ever used.

trio imports `ssl` for its TLS streams, `hmac` and `hashlib` load libcrypto where there is one. The agent's traffic goes
over vsock between a VM and its host. Only the agent's own process does this, never a test's or an importer's.
"""

from __future__ import annotations

import sys
import types


class _NoSsl(types.ModuleType):
    """Stands for `ssl`: names that annotations and class definitions mention exist; nothing can be done with them."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (Exception,), {"__init__": _refuse})


def _refuse(self: object, *_: object, **__: object) -> None:
    raise RuntimeError("this process runs without ssl (agent_guest.lean)")


def without_openssl() -> None:
    """To be called before anything imports `ssl`, `hashlib`, `hmac` or trio; does nothing when that has happened."""
    if "ssl" in sys.modules or "_hashlib" in sys.modules:
        return
    sys.modules["ssl"] = _NoSsl("ssl")
    # hashlib and hmac then use the interpreter's own implementations, as they do where Python has no OpenSSL.
    sys.modules["_hashlib"] = None  # type: ignore[assignment]  # the import system's documented "not importable"
