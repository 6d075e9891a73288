"""Records to token ids and labels, by task. Knows no files and no models."""
