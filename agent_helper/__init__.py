"""The agent in the helper VM."""
