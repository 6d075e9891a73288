"""Loading a pretrained model, questions to its config, activation checkpointing, sharding."""
