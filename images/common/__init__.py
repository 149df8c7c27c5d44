"""What the image builders share. Everything here writes the same bytes when it is given the same inputs."""
