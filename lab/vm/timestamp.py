"""How fast this machine's timestamp counter (TSC) runs. QEMU's emulated processors on x86_64 have it as their own."""

from __future__ import annotations

import ctypes
import functools
import mmap
import platform
import time
from pathlib import Path

# rdtsc; shl rdx, 32; or rax, rdx; ret
_READ = bytes.fromhex("0f31 48c1e220 4809d0 c3")
_STEADY = {"constant_tsc", "nonstop_tsc"}
_INTERVAL = 0.01  # s; with readings that are certain to within 1 us, the rate is to within 0.02 %
_TRIES = 50


@functools.cache
def timestamp_khz() -> int | None:
    """The counter's rate in kHz, measured once; None where there is none that runs steadily."""
    if platform.machine() != "x86_64" or not _is_steady():
        return None
    try:
        with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
            page.write(_READ)
            code = ctypes.c_char.from_buffer(page)
            read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(code))
            first, counted_first = _both(read)
            time.sleep(_INTERVAL)
            second, counted_second = _both(read)
            del read, code  # the page is not given back while something points to it
    except OSError:  # a machine that lets nobody run what they have written
        return None
    return round((counted_second - counted_first) * 1e6 / (second - first))


def _is_steady() -> bool:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.split()) >= _STEADY
    return False


def _both(read: ctypes._FuncPointer) -> tuple[float, int]:
    """The time in ns and the counter at the same moment: of some readings, the one that was interrupted least."""
    best, result = float("inf"), (0.0, 0)
    for _ in range(_TRIES):
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        counted = read()
        after = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        if after - before < best:
            best, result = after - before, ((before + after) / 2, counted)
    return result
