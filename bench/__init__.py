"""Benchmarks: taploom beside a plain veth pair, gvproxy's L2 switch and Docker's bridge, in one run on one machine.

Run `bench/setup.sh` once, then `python -m bench` (both as root). `bench/README.md` says what is measured and how.
"""
