"""What lets a run survive: checkpoint folders, signals, a watchdog, a lock. No engine is imported here."""
