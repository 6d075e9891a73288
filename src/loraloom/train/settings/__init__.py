"""What a run is told: options, and the file that holds them."""
