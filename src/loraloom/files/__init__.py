"""What every floor needs and nobody should write twice: atomic writes, locks, sizes."""
