"""Tasks: each owns the step, validation, preview and saving of what one script trains."""
