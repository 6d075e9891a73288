"""Before the first step: what it will need, and what would go wrong."""
