"""The whole schedule of a run as jobs, or here: `python -m launch.pipeline`."""
