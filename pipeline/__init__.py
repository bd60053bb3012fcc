"""What at least two processes need; imports neither torch nor numpy."""
