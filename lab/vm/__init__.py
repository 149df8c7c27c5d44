"""The lab on virtual machines: guests and the helper are QEMU VMs with a virtio-vsock device.

`machine` describes and runs one VM, `accelerator` finds what it runs with, `qmp` talks to its QEMU.
"""
