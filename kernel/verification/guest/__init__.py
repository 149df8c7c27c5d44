"""What runs inside the machine: every feature of the kernel is used there, each in namespaces of its own.

Standard library only; it is copied into the verification's initramfs.
"""
