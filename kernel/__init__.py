"""The Linux kernel of taploom's virtual machines: its configuration, its build, and its checks."""
