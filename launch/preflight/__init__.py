"""A look at nodes, data and the network before a stage trains: `python -m launch.preflight`."""
