"""Filter expressions (pcap-filter(7)) as programs of classic BPF, compiled by libpcap.

The bridge compiles and the helper's kernel runs the program: the helper needs no libpcap. macOS has one; Debian's is
libpcap0.8.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import Any

from host_bridge.errors import InvalidError, PreconditionError
from host_bridge.names import clean_text

_LIBRARIES = ("libpcap.so.0.8", "libpcap.so.1", "libpcap.A.dylib", "libpcap.dylib")
_ETHERNET = 1  # DLT_EN10MB
_UNKNOWN_NETMASK = 0xFFFFFFFF
_MAX_TEXT = 4096
_LOADS = (0, 1)  # BPF_LD, BPF_LDX
_METADATA = 0xFFFFF000  # SKF_AD_OFF: loads from there are no packet's bytes (linux/filter.h)
_MAX_SNAPLEN = 262_144
_lock = threading.Lock()

Instruction = tuple[int, int, int, int]


class _Instruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_ushort),
        ("jt", ctypes.c_ubyte),
        ("jf", ctypes.c_ubyte),
        ("k", ctypes.c_uint32),
    )


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint), ("instructions", ctypes.POINTER(_Instruction)))


def compile_filter(text: str, snaplen: int = 0) -> list[Instruction]:
    """The program of an expression: (code, jump when true, jump when false, operand).

    Names in it are looked up by this machine's resolver, which may take its time: call this in a thread.

    Args:
        snaplen: bytes of each packet that the program keeps; 0: all.

    Raises:
        InvalidError: it is malformed; the message has libpcap's words.
        PreconditionError: there is no libpcap.
    """
    if not text.strip() and not snaplen:
        return []
    if len(text.encode()) > _MAX_TEXT or "\0" in text:
        raise InvalidError(f"the filter must be at most {_MAX_TEXT} bytes of text")
    if not text.strip():
        return [(0x06, 0, 0, snaplen)]  # BPF_RET | BPF_K: keep so much of everything
    library = _library()
    if library is None:
        raise PreconditionError("filters need libpcap on the bridge's machine: install it (Debian: libpcap0.8)")
    with _lock:
        handle = library.pcap_open_dead(_ETHERNET, snaplen or _MAX_SNAPLEN)
        program = _Program()
        try:
            if library.pcap_compile(handle, ctypes.byref(program), text.encode(), 1, _UNKNOWN_NETMASK):
                reason = library.pcap_geterr(handle).decode(errors="replace")
                raise InvalidError(f"filter {clean_text(text, 100)!r}: {clean_text(reason)} (see pcap-filter(7))")
            found = program.instructions[: program.length]
            code = [(one.code, one.jt, one.jf, one.k) for one in found]
            library.pcap_freecode(ctypes.byref(program))
        finally:
            library.pcap_close(handle)
    if any(operation & 7 in _LOADS and operand >= _METADATA for operation, _, _, operand in code):
        # Of the TAP in the helper these would be told, where in and out are the other way round.
        raise InvalidError("inbound, outbound and what else is of an interface cannot be in a filter: use --direction")
    return code


@functools.cache
def _library() -> Any:
    for name in _LIBRARIES:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        library.pcap_open_dead.restype = ctypes.c_void_p
        library.pcap_open_dead.argtypes = (ctypes.c_int, ctypes.c_int)
        library.pcap_compile.argtypes = (
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_char_p,
            ctypes.c_int,
            ctypes.c_uint32,
        )
        library.pcap_geterr.restype = ctypes.c_char_p
        library.pcap_geterr.argtypes = (ctypes.c_void_p,)
        library.pcap_freecode.argtypes = (ctypes.c_void_p,)
        library.pcap_close.argtypes = (ctypes.c_void_p,)
        return library
    return None
