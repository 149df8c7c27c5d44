"""The data link: Ethernet frames of one endpoint, over one byte stream; and streams, which share its port.

``frames`` and ``handshake`` are the protocol, sans-IO; ``tap`` is the device; ``loop``, ``pump``, ``relay``, ``splice``
and ``datagrams`` run on the data-plane thread that ``dataplane`` starts; ``server`` listens (in guests and in the
helper), ``dial`` and ``streams`` dial (on the host).
"""

from taploom.link.authorization import new_secret
from taploom.link.dataplane import Attachment, Dataplane, DataplaneError, open_dataplane
from taploom.link.dial import FeatureMismatchError, LinkError, close_relay, dial_link, open_relay
from taploom.link.server import LinkServer, LinkStatus, UnknownEndpointError
from taploom.link.streams import (
    StreamError,
    StreamUnauthorizedError,
    StreamUnavailableError,
    StreamUnreachableError,
    open_stream,
)
from taploom.link.tap import Tap, TapError, probe_features

__all__ = [
    "Attachment",
    "Dataplane",
    "DataplaneError",
    "FeatureMismatchError",
    "LinkError",
    "LinkServer",
    "LinkStatus",
    "StreamError",
    "StreamUnauthorizedError",
    "StreamUnavailableError",
    "StreamUnreachableError",
    "Tap",
    "TapError",
    "UnknownEndpointError",
    "close_relay",
    "dial_link",
    "new_secret",
    "open_dataplane",
    "open_relay",
    "open_stream",
    "probe_features",
]
