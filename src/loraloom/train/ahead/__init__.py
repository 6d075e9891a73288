"""What a training will need and what would go wrong, before its first step."""
