"""Copies of what guests send and receive, for other guests."""
