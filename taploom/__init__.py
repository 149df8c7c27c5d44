"""What the guest agent, the helper agent and the host bridge share."""

__version__ = "0.1.0"
