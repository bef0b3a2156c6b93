"""Distilling a denoiser into a student that draws in few steps."""
