"""Output of a run for people: the lines on the terminal, the files of the run folder, the report page."""
