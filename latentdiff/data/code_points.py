"""What follows from code points alone: an emoji's kind, its name in files, and its split."""

import hashlib

REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)  # two are the flag of a country
TAGS = range(0xE0020, 0xE0080)  # of the flags of England, Scotland and Wales
SKIN_TONES = range(0x1F3FB, 0x1F400)

# Percentage that `held_out` leaves for the split `test`.
TEST_PERCENT = 5


def code_points(sequence: str) -> str:
    """Return the code points of `sequence` as text: "1F469-200D-1F680"."""
    return "-".join(f"{ord(character):04X}" for character in sequence)


def held_out(text: str) -> bool:
    """Tell whether the SHA-256 of `text`, as a whole number, leaves less than 5 divided by 100."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 100 < TEST_PERCENT
