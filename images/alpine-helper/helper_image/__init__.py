"""The parts of the helper image's build."""
