"""Shared basics without dependencies: atomic writes, locks, hashes, JSON, sizes, logging, resources."""
