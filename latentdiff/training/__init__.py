"""Training: one loop, learners, checkpoints, losses; it knows nothing of drawing images."""
