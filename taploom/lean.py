"""Keeps out of an agent's process what its libraries import and it never uses: a third of all modules, 7 MB of memory,
and in a VM without hardware acceleration seconds of its start.

- `ssl`: trio imports it for its TLS streams, hmac and hashlib load libcrypto where there is one. The agents' traffic
  goes over vsock between a VM and its host.
- `importlib.metadata`, with the whole of `email`: two libraries ask it for their own version.
- `dateutil`: the contracts use it to read timestamps from JSON.
- `bz2` and `lzma`: shutil can make archives with them where they are there.
- `logging.handlers`, with `pickle`: OVS's library imports them for the system's log.
- trio's TLS, TCP, files and child processes: they are imported with trio.
- What is only for people to look at: the socket module's constants as enumerations, the names of the modules that say
  that trio's classes are of trio itself, the signatures of dataclasses, the names of trio's threads.

And imports later what libraries import at once and hardly ever use, if at all: `LATER`.

Only an agent's own process does this, never a test's or an importer's: it is called by `__main__` modules, before they
import anything else.
"""

from __future__ import annotations

import os
import sys
import types
import typing
from collections.abc import Callable


def without_unused() -> None:
    """Leaves out all that this module knows of. What has been imported already stays."""
    without_openssl()
    without_metadata()
    without_dateutil()
    without_compression()
    without_log_handlers()
    without_transports()
    import_later()
    without_signatures()
    without_thread_names()
    without_socket_enums()
    without_slots()
    without_public_names()


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


def without_log_handlers() -> None:
    """To be called before anything imports `logging`; does nothing when that has happened."""
    if "logging" not in sys.modules:
        sys.modules["logging.handlers"] = _Missing("logging.handlers")


def without_transports() -> None:
    """To be called before anything imports trio, all parts of which are imported with it; does nothing when that has
    happened."""
    if "trio" not in sys.modules:
        for name in _TRIO_UNUSED:
            sys.modules[f"trio.{name}"] = _Missing(f"trio.{name}")


_TRIO_UNUSED = (
    "_dtls",
    "_file_io",
    "_highlevel_open_tcp_listeners",
    "_highlevel_open_tcp_stream",
    "_highlevel_ssl_helpers",
    "_path",
    "_ssl",
    "_subprocess",
    "_unix_pipes",
)

LATER = (
    "argparse",  # the command line, when it is not as in the images
    "ast",
    "attr.converters",
    "attr.validators",
    "attrs.converters",
    "attrs.validators",
    "dis",
    "idna",  # trio's sockets, for the names of hosts
    "inspect",
    "json",  # messages from and to JSON
    "ntpath",
    "platform",
    "selectors",  # socket, for sending files
    "subprocess",
    "textwrap",
    "tokenize",
    "traceback",  # logging, for exceptions
    "typing_extensions",
)
"""Modules of which libraries keep no more than a reference while they are imported."""


def import_later() -> None:
    """To be called before anything else is imported. What has been imported already stays."""
    for name in LATER:
        if name not in sys.modules:
            sys.modules[name] = _Later(name, **_AT_ONCE.get(name, {}))


def _instance_of(kind: type) -> object:
    """attrs' validator of that name."""

    def check(_: object, attribute: object, value: object) -> None:
        if not isinstance(value, kind):
            raise TypeError(f"{attribute!r} must be {kind!r}, not {value!r}")

    return check


def _is_coroutine(value: object) -> bool:
    return isinstance(value, types.CoroutineType)


def _python_implementation() -> str:
    return {"cpython": "CPython", "pypy": "PyPy"}.get(sys.implementation.name, "")


_AT_ONCE: dict[str, dict[str, object]] = {
    "attr.validators": {"instance_of": _instance_of},  # outcome
    "inspect": {"iscoroutine": _is_coroutine},  # trio, of what a thread has returned
    "platform": {"python_implementation": _python_implementation},  # attrs
    "typing_extensions": {"Self": typing.Self},  # betterproto2, contracts
}
"""What is wanted of modules of `LATER` while others are imported."""


def without_signatures() -> None:
    """Lets dataclasses give classes that have no docstring one without their signature: to make it takes several times
    as long as the rest of the class. And lets it look closer only at annotations that mention what it looks for. Does
    nothing when dataclasses has been imported."""
    if "dataclasses" in sys.modules:
        return
    import_later()  # inspect among others, which dataclasses imports
    import dataclasses

    dataclasses.inspect = _Inspect("inspect")  # type: ignore[attr-defined]
    is_type = dataclasses._is_type  # type: ignore[attr-defined]

    def mentions(annotation: str, *rest: object) -> bool:
        special = "Var" in annotation or "KW_ONLY" in annotation  # ClassVar, InitVar
        return special and is_type(annotation, *rest)

    dataclasses._is_type = mentions  # type: ignore[attr-defined]


def without_thread_names() -> None:
    """Keeps trio from naming its threads, for which it imports ctypes and would have compilers and ldconfig say where
    the C library is. Does nothing when ctypes has been imported."""
    if "ctypes" not in sys.modules:
        util = sys.modules["ctypes.util"] = _Missing("ctypes.util", find_library=_find_nothing)
        sys.modules["ctypes"] = _Later("ctypes", util=util, CDLL=_open_library)


def _find_nothing(_: str) -> str:
    return _NO_LIBRARY


def _open_library(name: str | None, *rest: object, **options: object) -> object:
    if name == _NO_LIBRARY:
        raise OSError("no library")
    module = sys.modules["ctypes"]
    if isinstance(module, _Later):
        module = _import(module)
        module.util = sys.modules["ctypes.util"]  # type: ignore[attr-defined]  # for who imports it after this
    return module.CDLL(name, *rest, **options)


_NO_LIBRARY = "none"


def without_socket_enums() -> None:
    """Imports `socket` with its constants as they are in C: plain integers. Of the enumerations there are the names.
    Does nothing when it has been imported."""
    if "socket" in sys.modules:
        return
    import enum

    kind = type(enum.IntEnum)
    convert = kind._convert_  # type: ignore[attr-defined]
    kind._convert_ = _keep_integers  # type: ignore[attr-defined]
    try:
        import socket  # noqa: F401
    finally:
        kind._convert_ = convert  # type: ignore[attr-defined]


def _keep_integers(_: type, name: str, module: str, wanted: Callable[[str], bool]) -> None:
    """In place of enum's way to make an enumeration of a module's constants."""
    found = vars(sys.modules[module])
    found[name] = type(name, (int,), {key: value for key, value in found.items() if wanted(key)})


def without_slots() -> None:
    """Has attrs decorate classes in place of making two more for each: one with slots, and one with the attributes'
    names for those that ask for them. To be called before trio is imported."""
    import attr._make
    import attrs

    defaults = attrs.define.__kwdefaults__
    assert defaults is not None
    defaults["slots"] = False
    attr._make._make_attr_tuple_class = lambda *_: tuple


def without_public_names() -> None:
    """Keeps trio from giving each public object of its submodules the name of the module that people know it from. To
    be called before trio is imported."""
    if "trio" not in sys.modules:
        sys.meta_path.insert(0, _PublicNames())  # type: ignore[arg-type]  # it has what is wanted of a finder


class _PublicNames:
    """An importer (docs.python.org, "The import system", "The meta path") of one module of trio's, once."""

    def find_spec(self, name: str, path: object, target: object = None) -> object:
        if name != "trio._util":
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]  # see above
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path)  # type: ignore[arg-type]
        spec = next(spec for spec in found if spec is not None)
        self._loader: typing.Any = spec.loader
        spec.loader = self  # type: ignore[assignment]  # as above, of a loader
        return spec

    def create_module(self, spec: object) -> object:
        return self._loader.create_module(spec)

    def exec_module(self, module: typing.Any) -> None:
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        module.fixup_module_metadata = lambda *_: None


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


class _Later(types.ModuleType):
    """Stands for a module until something of it is wanted, and then imports it; what is ``known`` is there at once."""

    def __init__(self, name: str, **known: object) -> None:
        super().__init__(name)
        self.__dict__.update(known)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__") and name != "__all__":
            raise AttributeError(name)
        return getattr(_import(self), name)

    def __dir__(self) -> list[str]:
        return dir(_import(self))


def _import(later: _Later) -> types.ModuleType:
    name = later.__name__
    if sys.modules.get(name) is later:
        del sys.modules[name]
    import importlib

    module = importlib.import_module(name)
    # Those who have it already, and do not ask again, for what they find in it.
    later.__dict__.update({key: value for key, value in vars(module).items() if not key.startswith("__")})
    return module


class _Inspect(_Later):
    """What dataclasses is to take for inspect."""

    @staticmethod
    def signature(*_: object) -> str:
        return ""

    @staticmethod
    def get_annotations(owner: type) -> dict[str, object]:
        return dict(vars(owner).get("__annotations__") or {})


def _refuse(self: object, *_: object, **__: object) -> None:
    raise RuntimeError("this process runs without that module (taploom.lean)")
