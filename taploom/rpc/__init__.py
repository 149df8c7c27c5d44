"""gRPC over HTTP/2 on any trio stream: a client, a server, and what generated service code is made of.

A client opens a channel on a connected stream; a server serves objects of the generated base classes::

    async with open_channel(await connect(address)) as channel:
        client = GuestServiceClient(channel)
        info = await client.get_info(GetInfoRequest(), timeout=5.0)
        async with client.watch_events(WatchEventsRequest()) as events:
            async for event in events:
                ...

    server = Server([GuestService()])          # GuestService derives from GuestServiceBase
    await server.serve(await open_listener(address))

From the wire up: `gate` looks at frame headers before h2 does, `connection` is HTTP/2 on a trio stream, `framing`,
`metadata` and `status` are gRPC's encodings, `wirecheck` stands before the message parser, `channel` and `server` are
the two ends, `health` and `reflection` two services that every server has.
"""

from .channel import Channel, open_channel
from .connection import ConnectionConfig
from .metadata import Metadata, MetadataLike
from .server import Server
from .service import ReceiveStream, SendStream, ServerContext
from .status import RpcError, StatusCode
from .wire import WireError

__all__ = (
    "Channel",
    "ConnectionConfig",
    "Metadata",
    "MetadataLike",
    "ReceiveStream",
    "RpcError",
    "SendStream",
    "Server",
    "ServerContext",
    "StatusCode",
    "WireError",
    "open_channel",
)
