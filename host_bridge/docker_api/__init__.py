"""Docker's Engine API, versions 1.24 to 1.51, on a stream socket: the real CLI, docker-py and Compose work with it."""
