"""One diagnosis each: what shows it, what to do."""
