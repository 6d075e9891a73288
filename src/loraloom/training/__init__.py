"""One run from options to a folder: checks, the loop, checkpoints, resume."""
