"""Train the autoencoder on images alone: accelerate launch train/train_vae.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("latentdiff.scripts.train_vae", run_name="__main__")
