"""The agent in a container's VM."""
