"""What tests share: tiny components, made-up files, runs of small trainings, and oracles."""
