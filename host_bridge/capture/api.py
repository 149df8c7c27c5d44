"""taploom.bridge.v1.CaptureService: captures at the helper, passed on."""

from __future__ import annotations

import logging

import trio

from host_bridge.api import as_status
from host_bridge.capture.filters import compile_filter
from host_bridge.errors import InvalidError, NotConnectedError, PreconditionError, UnavailableError
from host_bridge.fabric import Fabric
from host_bridge.model import EndpointRecord
from host_bridge.waiting import raised_alone
from taploom.address import AddressError, connect
from taploom.contracts.taploom.bridge import v1 as bridge
from taploom.contracts.taploom.bridge.v1.rpc import CaptureServiceBase
from taploom.contracts.taploom.helper import v1 as helper
from taploom.contracts.taploom.helper.v1.rpc import CaptureServiceClient
from taploom.rpc import ReceiveStream, RpcError, SendStream, ServerContext, StatusCode, open_channel

logger = logging.getLogger("taploom.bridge.capture")

_FILTER_TIMEOUT = 5.0  # s; names in a filter are looked up
_DIRECTIONS = {
    bridge.CaptureDirection.UNSPECIFIED: helper.CaptureDirection.UNSPECIFIED,
    bridge.CaptureDirection.IN: helper.CaptureDirection.IN,
    bridge.CaptureDirection.OUT: helper.CaptureDirection.OUT,
}
_ENDS = {
    helper.CaptureEnd.STOPPED: bridge.CaptureEnd.STOPPED,
    helper.CaptureEnd.COMPLETE: bridge.CaptureEnd.COMPLETE,
    helper.CaptureEnd.GONE: bridge.CaptureEnd.GONE,
}


class CaptureApi(CaptureServiceBase):
    """Packets of guests, live."""

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric

    async def capture(
        self,
        requests: ReceiveStream[bridge.CaptureRequest],
        responses: SendStream[bridge.CaptureResponse],
        context: ServerContext,
    ) -> None:
        request = await requests.receive()
        with as_status():
            if request is None:
                raise InvalidError("nothing was said to capture: send a request")
            wanted = await self._wanted(request)
            address = self._fabric.helper.address
            try:
                # A connection of its own: who reads slowly holds nobody else up.
                stream = await connect(address)
            except (OSError, AddressError) as error:
                raise UnavailableError(f"the helper does not answer: {error}") from error
        try:
            async with open_channel(stream) as channel:
                with raised_alone():
                    await _relay(CaptureServiceClient(channel), wanted, requests, responses)
        except RpcError as error:
            if error.code is StatusCode.UNAVAILABLE:
                raise RpcError(error.code, f"the helper went away: {error.message}") from error
            raise

    async def _wanted(self, request: bridge.CaptureRequest) -> helper.CaptureRequest:
        fabric = self._fabric
        if not fabric.helper.connected:
            raise UnavailableError(fabric.helper.problem)
        lack = fabric.helper.lack_of(helper.HelperFeature.CAPTURE)
        if lack:
            raise PreconditionError(lack)
        if request.direction not in _DIRECTIONS:
            raise InvalidError("this direction is not known: update the bridge")
        endpoints = self._endpoints(request)
        code = []
        with trio.move_on_after(_FILTER_TIMEOUT) as scope:
            code = await trio.to_thread.run_sync(
                compile_filter, request.filter, request.snaplen, abandon_on_cancel=True
            )
        if scope.cancelled_caught:
            raise InvalidError("a name in the filter cannot be looked up in time: use addresses")
        return helper.CaptureRequest(
            interfaces=[
                helper.CaptureInterface(endpoint_id=endpoint.id, name=self._name(endpoint)) for endpoint in endpoints
            ],
            filter=[
                helper.BpfInstruction(code=operation, jump_true=true, jump_false=false, k=operand)
                for operation, true, false, operand in code
            ],
            filter_text=request.filter,
            snaplen=request.snaplen,
            max_packets=request.max_packets,
            max_duration_ms=request.max_duration_ms,
            direction=_DIRECTIONS[request.direction],
        )

    def _endpoints(self, request: bridge.CaptureRequest) -> list[EndpointRecord]:
        desired = self._fabric.desired
        guest = desired.find_guest(request.guest)
        if not request.network:
            present = [endpoint for endpoint in desired.store.endpoints(guest_id=guest.id) if endpoint.active]
            # Tagged frames are captured with those of the interface that they are on.
            found = [endpoint for endpoint in present if endpoint.carried is None]
            if not found:
                raise PreconditionError(f"guest {guest.name} is on no network: connect it first")
            return found
        network = desired.find_network(request.network)
        endpoint = desired.store.endpoint_of(network.id, guest.id)
        if endpoint is None or not endpoint.active:
            raise NotConnectedError(guest.name, network.name, guest.id)
        if endpoint.carried is not None:
            raise PreconditionError(
                f"{guest.name} is on {network.name} by {endpoint.carried}: capture it on {endpoint.carried.parent}, "
                "its frames have the tag"
            )
        return [endpoint]

    def _name(self, endpoint: EndpointRecord) -> str:
        desired = self._fabric.desired
        return f"{desired.guest_name(endpoint.guest_id)}@{desired.network_name(endpoint.network_id)}"


async def _relay(
    client: CaptureServiceClient,
    wanted: helper.CaptureRequest,
    requests: ReceiveStream[bridge.CaptureRequest],
    responses: SendStream[bridge.CaptureResponse],
) -> None:
    async with client.capture() as call:
        await call.send(wanted)

        async def stop_at_end() -> None:
            while await requests.receive() is not None:
                pass
            await call.done_writing()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(stop_at_end)
            async for part in call:
                end = _ENDS.get(part.end, bridge.CaptureEnd.UNSPECIFIED)
                await responses.send(bridge.CaptureResponse(data=part.data, end=end))
            nursery.cancel_scope.cancel()
