"""The resolver on 127.0.0.11: config and lookup are sans-IO, exchange and server do the IO."""
