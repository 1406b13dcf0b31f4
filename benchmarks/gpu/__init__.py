"""What to run first on a machine with a GPU; docs/gpu.md says how."""
