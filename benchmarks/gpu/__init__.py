"""Checks for a machine with an NVIDIA GPU: `benchmarks/gpu/check.sh`."""
