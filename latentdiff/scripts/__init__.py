"""The programs of a training: each assembles data, task and run, and is in train/ too."""
