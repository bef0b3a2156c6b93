"""Distil a model into a student that draws in few steps: accelerate launch train/distill.py."""

from latentdiff.scripts.distill import main
from latentdiff.training.command_line import run_script

if __name__ == "__main__":
    run_script(main)
