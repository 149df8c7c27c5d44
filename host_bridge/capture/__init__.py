"""Packets of guests, live."""
