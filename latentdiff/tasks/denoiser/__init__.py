"""Training a UNet or a DiT to denoise latents."""
