"""Launch and process group: device, sharding of rows, and collectives."""
