"""Published ports: the host listens, and carries what comes over the helper's data port to the container.

``allocator`` chooses ports and binds sockets, ``publisher`` serves them, ``host_access`` is the way back: what
containers ask of the host's own services.
"""

from host_bridge.ports.allocator import PortAllocator
from host_bridge.ports.model import (
    AddressNotLocalError,
    NoPortLeftError,
    PortAllocatedError,
    PortBinding,
    PortError,
    PortInUseError,
    ProtocolError,
    PublishedPort,
)
from host_bridge.ports.publisher import PortPublisher, StreamHelper

__all__ = [
    "AddressNotLocalError",
    "NoPortLeftError",
    "PortAllocatedError",
    "PortAllocator",
    "PortBinding",
    "PortError",
    "PortInUseError",
    "PortPublisher",
    "ProtocolError",
    "PublishedPort",
    "StreamHelper",
]
