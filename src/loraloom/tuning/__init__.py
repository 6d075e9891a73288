"""Which configuration? The space, the search over packed trials, and the verdict."""
