"""What a run begins from: rows, tokenizer, frozen model."""
