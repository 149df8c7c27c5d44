"""TAP devices with virtio_net_hdr (linux/if_tun.h; Documentation/networking/tuntap.rst)."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import re
import socket
import struct
from collections.abc import Iterable
from typing import Final

from taploom.contracts.taploom.link.v1 import LinkFeature
from taploom.link.frames import HEADER_SIZE

__all__ = ["Tap", "TapError", "probe_features"]

_TUNSETIFF: Final = 0x400454CA
_TUNSETPERSIST: Final = 0x400454CB
_TUNSETOFFLOAD: Final = 0x400454D0
_TUNGETIFF: Final = 0x800454D2
_TUNSETVNETHDRSZ: Final = 0x400454D8
_TUNSETVNETLE: Final = 0x400454DC
_TUNSETCARRIER: Final = 0x400454E2
_IFF_TAP: Final = 0x0002
_IFF_NO_PI: Final = 0x1000
_IFF_VNET_HDR: Final = 0x4000
_TUN_F_CSUM: Final = 0x01
_TUN_F_TSO4: Final = 0x02
_TUN_F_TSO6: Final = 0x04
_TUN_F_USO4: Final = 0x20
_TUN_F_USO6: Final = 0x40
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,15}")

# linux/rtnetlink.h and linux/if_link.h. RTM_GETSTATS has the smallest answer with an interface's statistics.
_RTM_GETLINK: Final = 18
_RTM_GETSTATS: Final = 94
_RTM_NEWSTATS: Final = 92
_NLM_F_REQUEST: Final = 1
_IFLA_STATS_LINK_64: Final = 1
_TX_DROPPED: Final = 7  # index in struct rtnl_link_stats64


class TapError(OSError):
    """A TAP device cannot be opened or set up; the message says why."""


class Tap:
    """One TAP device, held open: as long as the descriptor lives (or for good when persistent) so does the interface.

    Frames are read and written with a 12-byte little-endian virtio_net_hdr before them. The descriptor does not
    block. The carrier is off until set_carrier(True).
    """

    def __init__(self, name: str, fd: int, stats: socket.socket) -> None:
        """Use Tap.open."""
        self.name: Final = name
        self._fd = fd
        self._stats = stats
        self._index: Final = socket.if_nametoindex(name)
        self.offloads: frozenset[LinkFeature] | None = None
        self.carrier = False
        self._drops_before: Final = self._tx_dropped()

    @classmethod
    def open(cls, name: str, *, persist: bool = False) -> Tap:
        """Create the TAP device ``name`` in the calling thread's network namespace, or open one that persisted.

        ``name``: 1 to 15 characters of [A-Za-z0-9_.-]. ``persist``: the interface outlives the descriptor.
        Raises TapError, for instance when another process holds the device.
        """
        if not _NAME.fullmatch(name) or name in {".", ".."}:
            raise TapError(
                errno.EINVAL, f"interface name {name!r} is not 1 to 15 characters of letters, digits and _.-"
            )
        with contextlib.ExitStack() as cleanup:
            try:
                fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError as error:
                raise TapError(
                    error.errno,
                    f"cannot open /dev/net/tun: {error.strerror}; the kernel needs CONFIG_TUN",
                ) from error
            cleanup.callback(os.close, fd)
            try:
                request = struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR)
                fcntl.ioctl(fd, _TUNSETIFF, request)
                # Attaching has turned the carrier on; nothing is behind the interface yet.
                fcntl.ioctl(fd, _TUNSETCARRIER, struct.pack("i", 0))
                fcntl.ioctl(fd, _TUNSETVNETHDRSZ, struct.pack("i", HEADER_SIZE))
                fcntl.ioctl(fd, _TUNSETVNETLE, struct.pack("i", 1))
                fcntl.ioctl(fd, _TUNSETOFFLOAD, 0)
                if persist:
                    fcntl.ioctl(fd, _TUNSETPERSIST, 1)
                stats = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
                cleanup.callback(stats.close)
                stats.setblocking(False)
                tap = cls(name, fd, stats)
            except OSError as error:
                raise TapError(error.errno, f"cannot open TAP {name}: {_why(error.errno, error.strerror)}") from error
            cleanup.pop_all()
        return tap

    def fileno(self) -> int:
        """The descriptor; -1 once closed."""
        return self._fd

    def set_offloads(self, features: Iterable[LinkFeature]) -> None:
        """Let the kernel hand out (and take) unfinished checksums and large segments, as ``features`` allows.

        Frames that were queued under other offloads are discarded: their headers may not fit any more.
        """
        wanted = frozenset(features)
        if wanted == self.offloads:
            return
        flags = 0
        if LinkFeature.TSO in wanted:
            flags |= _TUN_F_CSUM | _TUN_F_TSO4 | _TUN_F_TSO6
        if LinkFeature.USO in wanted:
            flags |= _TUN_F_CSUM | _TUN_F_USO4 | _TUN_F_USO6
        try:
            fcntl.ioctl(self._fd, _TUNSETOFFLOAD, flags)
        except OSError as error:
            raise TapError(
                error.errno,
                f"TAP {self.name} cannot do the offloads {sorted(f.name or '' for f in wanted)}: {error.strerror}",
            ) from error
        self.offloads = wanted
        self.discard_queue()

    def discard_queue(self) -> None:
        """Throw away the frames that wait to be read."""
        # At most what the queue holds now (1000 frames, the TAP's default queue length, and a margin).
        with contextlib.suppress(OSError):
            for _ in range(4096):
                os.read(self._fd, 1)

    def is_alive(self) -> bool:
        """Whether the interface is still there: it can be removed by others while the descriptor is open."""
        try:
            fcntl.ioctl(self._fd, _TUNGETIFF, bytes(40))
        except (OSError, ValueError):
            return False
        return True

    def set_carrier(self, on: bool) -> None:
        """Turn the interface's carrier on or off: what ``ip link`` shows as LOWER_UP. Raises TapError.

        Frames can pass on return (Linux >= 6.8; before, a few ms later).
        """
        if on == self.carrier:
            return
        try:
            fcntl.ioctl(self._fd, _TUNSETCARRIER, struct.pack("i", on))
        except OSError as error:
            raise TapError(error.errno, f"cannot set the carrier of TAP {self.name}: {error.strerror}") from error
        self.carrier = on
        # The kernel brings the queueing discipline back from a work queue, and until then drops what is sent: a
        # lost ARP request costs a second. Asking for the link's state waits for that work.
        self._ask(_RTM_GETLINK, bytes(8))

    def set_persist(self, on: bool) -> None:
        """Whether the interface outlives this descriptor. Raises TapError."""
        try:
            fcntl.ioctl(self._fd, _TUNSETPERSIST, int(on))
        except OSError as error:
            raise TapError(error.errno, f"cannot make TAP {self.name} persist: {error.strerror}") from error

    def tx_drops(self) -> int:
        """Frames that the kernel dropped since open because nobody read them in time; 0 if that cannot be told."""
        return max(0, self._tx_dropped() - self._drops_before)

    def _tx_dropped(self) -> int:
        """The interface's tx_dropped, over a socket of its own namespace: right from whichever thread asks."""
        # struct if_stats_msg without the index, and struct rtnl_link_stats64 in the first attribute
        reply = self._ask(_RTM_GETSTATS, struct.pack("=I", 1 << (_IFLA_STATS_LINK_64 - 1)))
        offset = 16 + 12 + 4 + 8 * _TX_DROPPED
        if len(reply) < offset + 8 or struct.unpack_from("=H", reply, 4)[0] != _RTM_NEWSTATS:
            return 0
        return int(struct.unpack_from("=Q", reply, offset)[0])

    def _ask(self, message_type: int, rest: bytes) -> bytes:
        """Ask rtnetlink(7) about one interface; empty when it does not answer."""
        # struct nlmsghdr; then 4 bytes of family and type and the index, in if_stats_msg and ifinfomsg alike
        request = struct.pack("=IHHIIII", 24 + len(rest), message_type, _NLM_F_REQUEST, 0, 0, 0, self._index) + rest
        try:
            self._stats.send(request)
            return self._stats.recv(16384)
        except OSError:
            return b""

    def close(self) -> None:
        """Close the descriptor; the interface goes away unless it is persistent. Closing twice is harmless."""
        if self._fd != -1:
            fd, self._fd = self._fd, -1
            os.close(fd)
            self._stats.close()

    def __enter__(self) -> Tap:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _why(number: int | None, text: str | None) -> str:
    match number:
        case errno.EBUSY:
            return "another process holds it"
        case errno.EINVAL:
            return "an interface of that name exists and is not a TAP of this kind"
        case errno.EPERM:
            return "CAP_NET_ADMIN is needed"
    return text or "unknown error"


@functools.cache
def probe_features() -> frozenset[LinkFeature]:
    """What this kernel's TAP devices can do; asked of a short-lived TAP, once per process.

    Empty where TAP devices cannot be opened at all (macOS, or no CAP_NET_ADMIN).
    """
    try:
        with Tap.open(f"tlp{os.urandom(5).hex()}") as tap:
            found = {LinkFeature.VNET_HDR}
            for feature in (LinkFeature.TSO, LinkFeature.USO):
                with contextlib.suppress(TapError):
                    tap.set_offloads({LinkFeature.VNET_HDR, feature})
                    found.add(feature)
            return frozenset(found)
    except TapError:
        return frozenset()
