"""What a person looks at: the step line, the run folder's files, the report page."""
