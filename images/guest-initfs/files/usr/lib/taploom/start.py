"""Starts the agent in the image: `python3 -I -S start.pyc`, with no site, no environment and one folder before all."""

import sys

sys.path.insert(0, "/usr/lib/taploom")

from agent_guest.__main__ import main

main()
