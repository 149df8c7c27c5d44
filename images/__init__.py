"""Builders of the images that the agents are baked into. They need the standard library and Debian's tools."""
