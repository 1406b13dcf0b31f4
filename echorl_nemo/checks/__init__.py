"""Everything that can refuse a run before it starts, with one module for each concern."""
