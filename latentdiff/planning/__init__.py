"""Capacity planning: the arithmetic, memory, time and disk of a training run before it starts."""
