"""What there is, for people to look at: the topology as a tree, as a drawing and as a page, and live rates."""
