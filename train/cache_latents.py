"""Encode a data set once, for train_unet.py: accelerate launch train/cache_latents.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("latentdiff.scripts.cache_latents", run_name="__main__")
