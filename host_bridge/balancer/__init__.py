"""Load balancers: an address and a name in front of several guests."""
