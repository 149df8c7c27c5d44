"""`taploom capture`."""

from __future__ import annotations

import contextlib
import datetime
import os
import select
import signal
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import click

from host_bridge.client import CommandError, call
from host_bridge.commands.options import bridge_options, complete_guest, complete_network
from host_bridge.output import print_json

if TYPE_CHECKING:
    from taploom.contracts.taploom.bridge.v1 import CaptureEnd, CaptureRequest, CaptureResponse
    from taploom.pcapng import Packet
    from taploom.rpc import Channel
    from taploom.rpc.channel import BidiCall


@click.command()
@click.argument("guest", shell_complete=complete_guest)
@click.option(
    "--network",
    metavar="NETWORK",
    default="",
    shell_complete=complete_network,
    help="On which network; default: all that it is on.",
)
@click.option("--filter", "expression", metavar="EXPR", default="", help="Which packets, as tcpdump has them.")
@click.option("-w", "--write", "path", metavar="FILE", help="Write pcapng; - is standard output.")
@click.option("--count", metavar="N", type=click.IntRange(1, 2**63 - 1), help="End after so many packets.")
@click.option("--duration", metavar="SECONDS", type=click.FloatRange(0.001, 10**9), help="End after so long.")
@click.option("--snaplen", metavar="BYTES", type=click.IntRange(14, 262144), help="Keep so much of each; default: all.")
@click.option(
    "--direction", type=click.Choice(["out", "in", "both"]), default="both", help="Seen from the guest; default: both."
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON document for each packet.")
@bridge_options
def capture(
    *,
    bridge: str,
    guest: str,
    network: str,
    expression: str,
    path: str | None,
    count: int | None,
    duration: float | None,
    snaplen: int | None,
    direction: str,
    as_json: bool,
) -> None:
    """Show the packets of GUEST, live, or write them as pcapng, until interrupted.

    They are taken from its interfaces in the helper; > is what it sends, < what it receives. EXPR is checked before
    anything is captured. What is not read in time is lost and counted; traffic never waits.

    \b
    Example:
        taploom capture web
        taploom capture web --network app --filter 'tcp port 80' --count 20
        taploom capture web -w web.pcapng --duration 10
        taploom capture web -w - | wireshark -k -i -
        taploom capture web -w - | tcpdump -n -r -
    """
    from taploom.contracts.taploom.bridge.v1 import CaptureDirection, CaptureRequest

    if as_json and path is not None:
        raise click.UsageError("--json and --write exclude each other.")
    request = CaptureRequest(
        guest=guest,
        network=network,
        filter=expression,
        snaplen=snaplen or 0,
        max_packets=count or 0,
        max_duration_ms=max(1, round(duration * 1000)) if duration else 0,
        direction={"in": CaptureDirection.IN, "out": CaptureDirection.OUT}.get(direction, CaptureDirection.UNSPECIFIED),
    )
    if path == "-" and sys.stdout.isatty():
        raise CommandError("standard output is a terminal: write to a file, or into a pipe")
    with contextlib.ExitStack() as stack:
        sink: _Sink
        if path is None:
            sink = _Lines(as_json=as_json)
        elif path == "-":
            sink = _File(sys.stdout.buffer)
        else:
            sink = _File(stack.enter_context(_opened(path)))
        end = _capture(bridge, request, sink)
    _report(sink, end)


def _opened(path: str) -> BinaryIO:
    try:
        return Path(path).open("wb")
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}") from error


def _report(sink: _Sink, end: CaptureEnd | None) -> None:
    from taploom.contracts.taploom.bridge.v1 import CaptureEnd

    if end is None:  # nobody reads any more
        return
    text = f"{sink.packets} packet{'' if sink.packets == 1 else 's'} captured"
    if sink.dropped:
        text += f", {sink.dropped} lost: they were not read in time"
    if end is CaptureEnd.GONE:
        text += "; the guest has left the network"
    click.echo(text, err=True)


class _Sink:
    """Where a capture goes."""

    def __init__(self) -> None:
        from taploom.pcapng import Reader

        self._reader = Reader()
        self._names: list[str] = []
        self._dropped: dict[int, int] = {}
        self.packets = 0

    @property
    def dropped(self) -> int:
        """Packets that were lost, as far as told."""
        return sum(self._dropped.values())

    def take(self, data: bytes) -> None:
        """Takes a part of the capture. Raises BrokenPipeError when nobody reads any more, OSError."""
        from taploom.pcapng import Interface, Packet

        for block in self._reader.feed(data):
            if isinstance(block, Packet):
                self.packets += 1
                self.show(block)
            elif isinstance(block, Interface):
                self._names.append(block.name)
            else:
                self._dropped[block.interface] = block.dropped

    def show(self, packet: Packet) -> None:
        """Shows a packet."""

    def name_of(self, packet: Packet) -> str:
        """The packet's interface, where there are several."""
        return self._names[packet.interface] if len(self._names) > 1 else ""


class _File(_Sink):
    """pcapng, in whole blocks: what is there can be read at any time."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self._rest = b""

    def take(self, data: bytes) -> None:
        from taploom.pcapng import whole_blocks

        super().take(data)
        self._rest += data
        size = whole_blocks(self._rest)
        self._file.write(self._rest[:size])
        self._file.flush()
        self._rest = self._rest[size:]


class _Lines(_Sink):
    """A line for each packet."""

    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def take(self, data: bytes) -> None:
        super().take(data)
        sys.stdout.flush()

    def show(self, packet: Packet) -> None:
        from host_bridge.capture.summary import summarise
        from taploom.pcapng import INBOUND

        moment = datetime.datetime.fromtimestamp(packet.time_ns // 1000 / 1e6, tz=datetime.UTC)
        text = summarise(packet.data, packet.length)
        incoming = packet.direction == INBOUND
        if self._as_json:
            print_json(
                {
                    "time": moment,
                    "interface": self._names[packet.interface],
                    "direction": "in" if incoming else "out",
                    "length": packet.length,
                    "summary": text,
                    "data": packet.data.hex(),
                },
                line=True,
            )
            return
        name = self.name_of(packet)
        head = f"{moment.astimezone():%H:%M:%S.%f} {name + ' ' if name else ''}{'<' if incoming else '>'}"
        click.echo(f"{head} {text}")


def _capture(bridge: str, request: CaptureRequest, sink: _Sink) -> CaptureEnd | None:
    """Captures until it is over; returns why it is, None when nobody reads standard output any more."""
    from taploom.pcapng import PcapngError

    async def run(channel: Channel) -> CaptureEnd | None:
        return await _follow(channel, request, sink)

    try:
        return call(bridge, run)
    except BrokenPipeError:
        _forget_standard_output()
        return None
    except PcapngError as error:
        raise CommandError(f"what the bridge sends is no capture: {error}") from error
    except OSError as error:
        raise CommandError(f"the capture cannot be written: {error.strerror}") from error


def _forget_standard_output() -> None:
    # Nothing is to be flushed there at exit either.
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


async def _follow(channel: Channel, request: CaptureRequest, sink: _Sink) -> CaptureEnd | None:
    import trio

    from host_bridge.waiting import raised_alone
    from taploom.contracts.taploom.bridge.v1 import CaptureEnd
    from taploom.contracts.taploom.bridge.v1.rpc import CaptureServiceClient

    end: CaptureEnd = CaptureEnd.STOPPED
    unread = False

    async def stop_when_asked(stream: BidiCall[CaptureRequest, CaptureResponse], scope: trio.CancelScope) -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            asked = False
            async for _ in signals:
                if asked:  # twice: now
                    scope.cancel()
                    return
                asked = True
                await stream.done_writing()

    async def stop_when_unread(scope: trio.CancelScope) -> None:
        nonlocal unread
        await _wait_unread()
        unread = True
        scope.cancel()

    with trio.CancelScope() as scope, raised_alone():
        async with CaptureServiceClient(channel).capture() as stream, trio.open_nursery() as nursery:
            nursery.start_soon(stop_when_asked, stream, scope)
            nursery.start_soon(stop_when_unread, scope)
            await stream.send(request)
            async for part in stream:
                if part.data:
                    # Whoever reads it may be slow; then the helper drops.
                    await trio.to_thread.run_sync(sink.take, part.data, abandon_on_cancel=True)
                if part.end:
                    end = part.end
            nursery.cancel_scope.cancel()
    return None if unread else end


async def _wait_unread() -> None:
    """Returns when standard output is a pipe that nobody reads any more."""
    import trio

    kind = os.fstat(1).st_mode
    if not (stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind)):
        await trio.sleep_forever()
    poller = select.poll()
    poller.register(1, 0)
    while not poller.poll(0):
        try:
            # A pipe's writing end is never readable: what is told is that it is broken.
            await trio.lowlevel.wait_readable(1)
        except OSError:
            await trio.sleep_forever()
        if not poller.poll(0):
            await trio.sleep_forever()  # a socket that somebody writes to
