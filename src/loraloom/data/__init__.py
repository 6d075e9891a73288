"""Rows in, token batches out. Knows no model and no adapter."""
