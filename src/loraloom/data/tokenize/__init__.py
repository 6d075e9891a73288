"""Records to tokenised examples."""
