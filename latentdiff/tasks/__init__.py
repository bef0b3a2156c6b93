"""What the scripts train: a task owns the step, validation, preview and saving of one module."""
