"""What a training will need, before it starts: arithmetic, memory, time and disk."""
