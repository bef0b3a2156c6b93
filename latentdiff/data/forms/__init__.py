"""The forms that data comes in, each with its files and two ways to walk through them."""
