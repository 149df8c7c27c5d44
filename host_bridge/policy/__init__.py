"""Which connections may pass: groups of guests, their rules, and what networks deny."""
