"""What touches the outside world, or training in general: nothing of codebooks or attention."""
