"""Containers: durable records of what Docker's clients want to run, and a runtime that runs it.

A container is a record in the bridge's database. While it runs, a guest of the fabric has the same id and name, its
networks are the guest's endpoints, and its published ports are the bridge's own listeners. The runtime boots the VM and
runs processes in it; it is any process that serves `taploom.runtime.v1`.
"""

from host_bridge.containers.errors import ContainerError
from host_bridge.containers.manager import ContainerManager
from host_bridge.containers.model import Container
from host_bridge.containers.runtime import RuntimeClient

__all__ = ("Container", "ContainerError", "ContainerManager", "RuntimeClient")
