"""Train the denoiser, a UNet or a DiT, on cached latents: accelerate launch train/train_unet.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("latentdiff.scripts.train_unet", run_name="__main__")
