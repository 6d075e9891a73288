"""What an adapter is worth on held-out rows, and what it says of some."""
