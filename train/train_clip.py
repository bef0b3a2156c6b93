"""Train a tokenizer and both CLIP towers, or train on: accelerate launch train/train_clip.py."""

from latentdiff.scripts.train_clip import main
from latentdiff.training.command_line import run_script

if __name__ == "__main__":
    run_script(main)
