"""Benchmarks of attn_ext against its peers: ``python -m benchmarks --help``."""
