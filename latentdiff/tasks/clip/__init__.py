"""Training a tokenizer and both towers of a CLIP."""
