"""The data link: Ethernet frames of one endpoint, over one byte stream; and streams, which share its port.

``frames`` and ``handshake`` are the protocol, sans-IO; ``tap`` is the device; ``loop``, ``pump``, ``relay``, ``splice``
and ``datagrams`` run on the data-plane thread that ``dataplane`` starts; ``server`` listens (in guests and in the
helper), ``dial`` and ``streams`` dial (on the host).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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

_MODULES = {
    "Attachment": "taploom.link.dataplane",
    "Dataplane": "taploom.link.dataplane",
    "DataplaneError": "taploom.link.dataplane",
    "FeatureMismatchError": "taploom.link.dial",
    "LinkError": "taploom.link.dial",
    "LinkServer": "taploom.link.server",
    "LinkStatus": "taploom.link.server",
    "StreamError": "taploom.link.streams",
    "StreamUnauthorizedError": "taploom.link.streams",
    "StreamUnavailableError": "taploom.link.streams",
    "StreamUnreachableError": "taploom.link.streams",
    "Tap": "taploom.link.tap",
    "TapError": "taploom.link.tap",
    "UnknownEndpointError": "taploom.link.server",
    "close_relay": "taploom.link.dial",
    "dial_link": "taploom.link.dial",
    "new_secret": "taploom.link.authorization",
    "open_dataplane": "taploom.link.dataplane",
    "open_relay": "taploom.link.dial",
    "open_stream": "taploom.link.streams",
    "probe_features": "taploom.link.tap",
}


def __getattr__(name: str) -> object:
    # Imported when it is wanted (PEP 562): the guest's agent answers before it needs most of it.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value
