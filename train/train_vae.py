"""Train the autoencoder on images alone: accelerate launch train/train_vae.py."""

from latentdiff.scripts.train_vae import main
from latentdiff.training.command_line import run_script

if __name__ == "__main__":
    run_script(main)
