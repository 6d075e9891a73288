"""What a task means: its loss, its metrics. Knows no files and no options."""
