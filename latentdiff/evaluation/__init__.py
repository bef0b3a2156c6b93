"""How good drawn pictures are."""
