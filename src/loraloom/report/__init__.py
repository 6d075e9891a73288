"""Records in; terminal, pictures and trackers out."""
