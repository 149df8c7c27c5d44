"""What a Linux kernel must have for taploom and for what runs on its networks, and whether a given one has it.

Runs on any system: a configuration file of a Linux kernel is judged on macOS too.
"""
