"""taploom.helper.v1.CaptureService over a fabric: a process for each capture, whose output is passed on."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
from typing import Any

import trio

from agent_helper.capture_worker import COMPLETE, GONE, STOPPED, WRONG_FILTER
from agent_helper.errors import ExhaustedError, HelperError, InvalidSpecError, NotFoundError
from agent_helper.fabric import Fabric
from agent_helper.ids import check_id
from agent_helper.service import as_status
from taploom.contracts.taploom.helper.v1 import CaptureDirection, CaptureEnd, CaptureRequest, CaptureResponse
from taploom.contracts.taploom.helper.v1.rpc import CaptureServiceBase
from taploom.rpc import ReceiveStream, SendStream, ServerContext

logger = logging.getLogger("taploom.helper.capture")

_MAX_CAPTURES = 16
_MAX_INTERFACES = 64
_MAX_INSTRUCTIONS = 4096
_MIN_SNAPLEN, _MAX_SNAPLEN = 14, 262_144
_MAX_TEXT = 4096
_CHUNK = 64 << 10
_PROGRAM = "from agent_helper.capture_worker import main; raise SystemExit(main())"
_ENDS = {STOPPED: CaptureEnd.STOPPED, COMPLETE: CaptureEnd.COMPLETE, GONE: CaptureEnd.GONE}
_DIRECTIONS = {
    CaptureDirection.UNSPECIFIED: "",
    CaptureDirection.IN: "in",
    CaptureDirection.OUT: "out",
}


class CaptureService(CaptureServiceBase):
    """Packets of endpoints."""

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric
        self._running = 0

    async def capture(
        self,
        requests: ReceiveStream[CaptureRequest],
        responses: SendStream[CaptureResponse],
        context: ServerContext,
    ) -> None:
        with as_status():
            request = await requests.receive()
            if request is None:
                raise InvalidSpecError("nothing was said to capture: send a request")
            config = self._config(request)
            if self._running >= _MAX_CAPTURES:
                raise ExhaustedError(f"{_MAX_CAPTURES} captures are under way, the limit: end one first")
            self._running += 1
            try:
                end = await _run(config, requests, responses)
            finally:
                self._running -= 1
        await responses.send(CaptureResponse(end=end))

    def _config(self, request: CaptureRequest) -> dict[str, Any]:
        if not 1 <= len(request.interfaces) <= _MAX_INTERFACES:
            raise InvalidSpecError(f"interfaces must be 1 to {_MAX_INTERFACES}, not {len(request.interfaces)}")
        if request.direction not in _DIRECTIONS:
            raise InvalidSpecError("direction is not known; update the helper")
        if request.snaplen and not _MIN_SNAPLEN <= request.snaplen <= _MAX_SNAPLEN:
            raise InvalidSpecError(f"snaplen {request.snaplen} must be {_MIN_SNAPLEN} to {_MAX_SNAPLEN}, or 0")
        if len(request.filter) > _MAX_INSTRUCTIONS:
            raise InvalidSpecError(f"filter must have at most {_MAX_INSTRUCTIONS} instructions")
        for step in request.filter:
            if step.code > 0xFFFF or step.jump_true > 0xFF or step.jump_false > 0xFF:
                raise InvalidSpecError("filter: an instruction is out of range")
        if len(request.filter_text.encode()) > _MAX_TEXT or any(len(one.name) > 255 for one in request.interfaces):
            raise InvalidSpecError(f"filter_text must be at most {_MAX_TEXT} bytes, names at most 255 characters")
        interfaces = []
        for one in request.interfaces:
            check_id("endpoint_id", one.endpoint_id)
            endpoint = self._fabric.endpoints.get(one.endpoint_id)
            if endpoint is None or endpoint.tap is None:
                raise NotFoundError(f"endpoint {one.endpoint_id} is not here; apply it first")
            spec = endpoint.spec
            interfaces.append(
                {
                    "tap": endpoint.tap.name,
                    "name": one.name or spec.endpoint_id,
                    "description": " ".join(map(str, spec.addresses)),
                    "mac": spec.mac_address.replace(":", ""),
                }
            )
        return {
            "interfaces": interfaces,
            "filter": [(step.code, step.jump_true, step.jump_false, step.k) for step in request.filter],
            "filter_text": request.filter_text,
            "snaplen": request.snaplen,
            "max_packets": request.max_packets,
            "max_duration_ms": request.max_duration_ms,
            "direction": _DIRECTIONS[request.direction],
        }


async def _run(
    config: dict[str, Any], requests: ReceiveStream[CaptureRequest], responses: SendStream[CaptureResponse]
) -> CaptureEnd:
    """Passes a worker's output on until it ends; returns why it did."""
    (stdin, child_in), (stdout, child_out) = socket.socketpair(), socket.socketpair()
    with child_in, child_out:
        process = await trio.to_thread.run_sync(_start, child_in, child_out)
    orders = trio.SocketStream(trio.socket.from_stdlib_socket(stdin))
    packets = trio.SocketStream(trio.socket.from_stdlib_socket(stdout))
    logger.info("capture of %s: begins", ", ".join(one["name"] for one in config["interfaces"]))
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_stop_at_end, requests, orders, json.dumps(config).encode() + b"\n")
            while data := await packets.receive_some(_CHUNK):
                await responses.send(CaptureResponse(data=bytes(data)))
            nursery.cancel_scope.cancel()
        _, said = await trio.to_thread.run_sync(process.communicate)
    finally:
        with trio.CancelScope(shield=True):
            if process.poll() is None:
                process.kill()
                await trio.to_thread.run_sync(process.communicate)
            for stream in (orders, packets):
                await stream.aclose()
    text = said.decode(errors="replace").strip().rpartition("\n")[2]
    logger.info("capture of %s: ended: %s", ", ".join(one["name"] for one in config["interfaces"]), text)
    if process.returncode == 0:
        return _ENDS.get(text, CaptureEnd.STOPPED)
    if WRONG_FILTER in text:
        raise InvalidSpecError(text)
    raise HelperError(f"the capture failed: {text or process.returncode}")


async def _stop_at_end(requests: ReceiveStream[CaptureRequest], stdin: trio.abc.SendStream, config: bytes) -> None:
    """Tells the worker what to do, and that it is over once there are no more requests."""
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):  # it has ended by itself
        await stdin.send_all(config)
        while await requests.receive() is not None:
            pass
        await stdin.aclose()


def _start(stdin: socket.socket, stdout: socket.socket) -> subprocess.Popen[bytes]:
    main = sys.modules["__main__"]
    if hasattr(main, "BUNDLE"):  # in an image, whose modules are all in one file (images/common/start.py)
        program = ["-I", "-B", str(main.__file__), "agent_helper.capture_worker"]
    else:
        program = ["-c", _PROGRAM]
    # trio's own processes are not there in an agent (taploom.lean).
    return subprocess.Popen(
        [sys.executable, "-S", *program],
        stdin=stdin.fileno(),
        stdout=stdout.fileno(),
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
