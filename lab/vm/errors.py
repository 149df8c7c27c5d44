"""What can be wrong with a machine that is to run VMs."""

from __future__ import annotations


class MachineError(Exception):
    """A VM cannot be started, or did not do what it was to; the message says what to do."""
