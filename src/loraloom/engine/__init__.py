"""The step: many slots in one forward and backward, one update each. Knows no files and no options."""
