"""Train the denoiser, a UNet or a DiT, on cached latents: accelerate launch train/train_unet.py."""

from latentdiff.scripts.train_unet import main
from latentdiff.training.command_line import run_script

if __name__ == "__main__":
    run_script(main)
