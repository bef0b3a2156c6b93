"""Projects: one folder from own images to a model, made by `latentdiff new`, run by `train`."""
