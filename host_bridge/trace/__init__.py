"""Whether and why a connection would pass."""
