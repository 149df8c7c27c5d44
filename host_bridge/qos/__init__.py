"""How much guests may send and receive, and which DSCP what they send has."""
