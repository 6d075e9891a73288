"""Metrics as pure functions, and which of them a task has."""
