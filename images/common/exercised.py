"""What the exercises of both images' agents do alike. Lies beside an image's exercise.py when that runs.

    python3 exercise.py DIRECTORY COMMAND…

COMMAND starts the agent with its sockets in DIRECTORY. Ends with 0 when the agent did everything and ended by SIGTERM.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable

from taploom.lean import without_unused

without_unused()  # before the imports below: the root has no OpenSSL

import trio

from taploom.address import Address, connect, parse_address
from taploom.contracts.taploom.link.v1 import LinkFeature
from taploom.link.dial import dial_link
from taploom.link.handshake import RefusedError
from taploom.rpc import Channel, open_channel

FEATURES = frozenset({LinkFeature.VNET_HDR, LinkFeature.TSO, LinkFeature.USO})


def exercise(calls: Callable[[Channel, Address], Awaitable[None]], *, seconds: float) -> None:
    """Runs the command line's agent; `calls` is what it is asked, with the address of its data port."""
    trio.run(_exercise, calls, seconds)


async def _exercise(calls: Callable[[Channel, Address], Awaitable[None]], seconds: float) -> None:
    control, data = (parse_address(f"unix:{sys.argv[1]}/{name}.sock") for name in ("control", "data"))
    process = subprocess.Popen(sys.argv[2:])
    with trio.fail_after(seconds):
        try:
            async with open_channel(await _connected(control, process)) as channel:
                await calls(channel, data)
            await _garbage(control, data)
        finally:
            process.send_signal(signal.SIGTERM)
        if await trio.to_thread.run_sync(process.wait):
            raise SystemExit(f"the agent ended with {process.returncode}")


async def _connected(control: Address, process: subprocess.Popen[bytes]) -> trio.abc.Stream:
    while True:
        try:
            return await connect(control)
        except OSError:
            if process.poll() is not None:
                raise SystemExit(f"the agent ended with {process.returncode}") from None
            await trio.sleep(0.05)


async def _garbage(control: Address, data: Address) -> None:
    """Bytes that are no HTTP/2, no handshake and a wrong secret: the agent's own error messages."""
    for address in (control, data):
        stream = await connect(address)
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.send_all(b"\xff" * 64)
            await stream.receive_some()
        await stream.aclose()
    with contextlib.suppress(RefusedError):
        await dial_link(data, endpoint_id="nobody", secret=b"x" * 32, features=())
