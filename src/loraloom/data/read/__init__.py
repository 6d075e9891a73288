"""Files, folders and datasets to rows, one at a time. Knows no columns, tasks or tokenizers."""
