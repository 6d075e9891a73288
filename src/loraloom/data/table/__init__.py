"""All rows of a run to a table of examples: read, tokenised by several processes, kept on disk."""
