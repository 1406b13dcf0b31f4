"""Protection of a run against failures: checkpoint folders, signals, watchdog, lock, the end of ranks."""
