"""Checkpoint folders, and resuming from them."""
