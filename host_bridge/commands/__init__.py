"""The commands of `taploom` that talk to the bridge, one module per group; each is imported when it is invoked."""
