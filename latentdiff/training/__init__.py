"""Training of any task: the loop, learners, checkpoints and logging. Sampling is elsewhere."""
