"""Rows to checked records: which columns mean what. Knows no files and no tokenizers."""
