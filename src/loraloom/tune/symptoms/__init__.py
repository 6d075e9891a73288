"""One symptom of a search each: its figures, and what to do about it."""
