"""All rows of a run as a table of examples: scanned, tokenised by several processes, kept on disk."""
