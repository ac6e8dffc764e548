"""Parts of the loader benchmark (`python -m benchmarks.loader`)."""
