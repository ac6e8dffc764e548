"""Parts of `python -m benchmarks.checkpoint`: what runs on ranks and in processes of its own."""
