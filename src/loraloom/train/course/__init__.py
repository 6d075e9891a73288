"""A run on its way: checkpoints, going on from them, signals, what is written in the end."""
