"""The three networks: text encoder, autoencoder, denoising UNet."""
