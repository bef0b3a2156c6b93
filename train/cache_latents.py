"""Encode a data set once, for train_unet.py: accelerate launch train/cache_latents.py."""

from latentdiff.scripts.cache_latents import main
from latentdiff.training.command_line import run_script

if __name__ == "__main__":
    run_script(main)
