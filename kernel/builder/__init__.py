"""Building the kernel: source, configuration from fragments, compilation, a cache by content."""
