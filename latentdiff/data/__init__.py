"""Captioned images: reading and checking data sets, batches, latent caches, generated data sets."""
