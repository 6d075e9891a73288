"""ONE loop, for a pack of one or of many."""
