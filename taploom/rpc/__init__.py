"""gRPC over HTTP/2 on any trio stream: a client, a server, and what generated service code is made of."""

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
