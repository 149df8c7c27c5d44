"""Builds the guest image; images/guest-initfs/README.md is its page."""
