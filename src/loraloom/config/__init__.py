"""Options: LoraConfig, TrainConfig, the run file. Checks names, types and ranges; loads no torch."""
