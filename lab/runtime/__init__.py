"""The lab's container runtime: `taploom.runtime.v1` on namespaces of this machine instead of VMs.

One process per lab, the first of a PID namespace of its own and with a mount namespace of its own (`isolate`): when it
ends, however it ends, the kernel takes every process and every mount of its containers along. crun does what an OCI
runtime does; a container's guest agent runs beside it, in its network namespace (`agents`).
"""
