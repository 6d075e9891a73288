"""An adapter at work on rows: losses, predictions, generated texts."""
