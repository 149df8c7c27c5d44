"""Proves the kernel's features by using them in a machine that boots it; see README.md beside this file."""
