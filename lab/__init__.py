"""The whole fabric on one Linux machine."""
