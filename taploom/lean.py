"""Keeps out of an agent's process what its libraries import and it never uses: a third of all modules, 7 MB of memory,
and in a VM without hardware acceleration seconds of its start.

- `ssl`: trio imports it for its TLS streams, hmac and hashlib load libcrypto where there is one. The agents' traffic
  goes over vsock between a VM and its host.
- `importlib.metadata`, with the whole of `email`: two libraries ask it for their own version.
- `dateutil`: the contracts use it to read timestamps from JSON.
- `bz2` and `lzma`: shutil can make archives with them where they are there.
- trio's DTLS: it is imported with trio.

Only an agent's own process does this, never a test's or an importer's: it is called by `__main__` modules, before they
import anything else.
"""

from __future__ import annotations

import os
import sys
import types


def without_unused() -> None:
    """Leaves out all that this module knows of. What has been imported already stays."""
    without_openssl()
    without_metadata()
    without_dateutil()
    without_compression()
    without_dtls()


def without_openssl() -> None:
    """To be called before anything imports `ssl`, `hashlib`, `hmac` or trio; does nothing when that has happened."""
    if "ssl" in sys.modules or "_hashlib" in sys.modules:
        return
    sys.modules["ssl"] = _Missing("ssl")
    # hashlib and hmac then use the interpreter's own implementations, as they do where Python has no OpenSSL.
    sys.modules["_hashlib"] = None  # type: ignore[assignment]  # the import system's documented "not importable"


def without_metadata() -> None:
    """To be called before anything imports `importlib.metadata` or pbr; does nothing when that has happened."""
    if "importlib.metadata" in sys.modules or "pbr" in sys.modules:
        return
    import importlib

    metadata = _Missing("importlib.metadata", version=installed_version)
    sys.modules["importlib.metadata"] = importlib.metadata = metadata
    # OpenStack's way of asking the same.
    sys.modules["pbr.version"] = _Missing("pbr.version", VersionInfo=_VersionInfo)
    sys.modules["pbr"] = _Missing("pbr", version=sys.modules["pbr.version"])


def without_dateutil() -> None:
    """To be called before anything imports `dateutil`; does nothing when that has happened."""
    if "dateutil" in sys.modules:
        return
    sys.modules["dateutil.parser"] = _Missing("dateutil.parser")
    sys.modules["dateutil"] = _Missing("dateutil", parser=sys.modules["dateutil.parser"])


def without_compression() -> None:
    """To be called before anything imports `shutil`; does nothing when that has happened."""
    if "shutil" not in sys.modules:
        for name in ("bz2", "lzma"):
            sys.modules[name] = None  # type: ignore[assignment]  # the import system's documented "not importable"


def without_dtls() -> None:
    """To be called before anything imports trio; does nothing when that has happened."""
    if "trio" not in sys.modules:
        sys.modules["trio._dtls"] = _Missing("trio._dtls")


def installed_version(name: str) -> str:
    """The version of an installed distribution, by the name of its .dist-info folder (packaging.python.org, "Recording
    installed projects").

    Raises:
        ImportError: it is not there, as importlib.metadata's own exception is.
    """
    for folder in sys.path:
        try:
            entries = os.listdir(folder or ".")  # noqa: PTH208 -- pathlib would be imported for this
        except OSError:
            continue
        for entry in entries:
            distribution, _, rest = entry.partition("-")
            if rest.endswith(".dist-info") and distribution.lower().replace("_", "-") == name.lower().replace("_", "-"):
                return rest.removesuffix(".dist-info")
    raise ModuleNotFoundError(f"no package metadata was found for {name}")


class _VersionInfo:
    def __init__(self, package: str) -> None:
        self._package = package

    def version_string(self) -> str:
        return installed_version(self._package)


class _Missing(types.ModuleType):
    """Stands for a module. Names that annotations and classes mention exist; only `known` ones can be used."""

    def __init__(self, name: str, **known: object) -> None:
        super().__init__(name)
        self.__dict__.update(known)

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (Exception,), {"__init__": _refuse})


def _refuse(self: object, *_: object, **__: object) -> None:
    raise RuntimeError("this process runs without that module (taploom.lean)")
