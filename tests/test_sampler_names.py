"""What samplers are called elsewhere is answered with what they are called here."""

import re

import pytest

from latentdiff.samplers import find_sampler


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("euler_a", "euler_ancestral"),
        ("Euler a", "euler_ancestral"),
        ("k_euler_a", "euler_ancestral"),
        ("dpm++", "dpmpp_2m"),
        ("dpmpp2m", "dpmpp_2m"),
        ("DPM++ 2M Karras", "dpmpp_2m with level_spacing=karras"),
        ("DPM++ 2M SDE Exponential", "dpmpp_2m_sde with level_spacing=exponential"),
        ("DPM++ SDE", "dpmpp_sde"),
        ("dpmpp_2m_karras", "dpmpp_2m with level_spacing=karras"),
        ("euler sgm_uniform", "euler with level_spacing=trailing"),
        ("uni_pc", "unipc"),
        ("PLMS", "pndm"),
        ("DDIM", "ddim"),
        ("euler-ancestral", "euler_ancestral"),
        ("eular", "euler"),
    ],
)
def test_a_samplers_name_elsewhere_is_answered_with_ours(name: str, ours: str) -> None:
    """The name euler_a was answered with euler, and dpm++ with ddpm."""
    with pytest.raises(ValueError, match=f"did you mean {re.escape(ours)}\\?"):
        find_sampler(name)
