"""Train a tokenizer and both CLIP towers, or train on: accelerate launch train/train_clip.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("latentdiff.scripts.train_clip", run_name="__main__")
