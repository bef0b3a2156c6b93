"""Captioned images: data sets that build themselves offline, and their way into tensors."""
