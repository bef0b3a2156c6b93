"""Distil a model into a student that draws in few steps: accelerate launch train/distill.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("latentdiff.scripts.distill", run_name="__main__")
