"""Launch and process group: which device, which rows, and what the processes add up."""
