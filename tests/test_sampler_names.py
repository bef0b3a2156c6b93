"""What samplers are called elsewhere is taken for what they are called here."""

import re

import pytest

from latentdiff.request import Request
from latentdiff.samplers import find_sampler


@pytest.mark.parametrize(
    ("name", "ours", "spacing"),
    [
        ("euler_a", "euler_ancestral", None),
        ("Euler a", "euler_ancestral", None),
        ("k_euler_a", "euler_ancestral", None),
        ("dpmpp2m", "dpmpp_2m", None),
        ("DPM++ 2M Karras", "dpmpp_2m", "karras"),
        ("DPM++ 2M SDE Exponential", "dpmpp_2m_sde", "exponential"),
        ("DPM++ SDE", "dpmpp_sde", None),
        ("dpmpp_2m_karras", "dpmpp_2m", "karras"),
        ("euler sgm_uniform", "euler", "trailing"),
        ("uni_pc", "unipc", None),
        ("PLMS", "pndm", None),
        ("DDIM", "ddim", None),
        ("euler-ancestral", "euler_ancestral", None),
    ],
)
def test_a_samplers_name_elsewhere_is_ours(name: str, ours: str, spacing: str | None) -> None:
    request = Request("a cat", sampler=name, seed=0)
    assert (request.sampler, request.level_spacing) == (ours, spacing)


def test_two_level_spacings_are_refused() -> None:
    with pytest.raises(ValueError, match="dpmpp_2m with level_spacing=karras, and level_spacing"):
        Request("a cat", sampler="DPM++ 2M Karras", level_spacing="trailing")
    assert Request("a cat", sampler="DPM++ 2M Karras", level_spacing="karras").sampler == "dpmpp_2m"


@pytest.mark.parametrize(
    ("name", "ours"), [("dpm++", "dpmpp_2m"), ("eular", "euler"), ("DPM++ 3M SDE", "dpmpp_2m_sde")]
)
def test_a_name_of_none_is_answered_with_the_nearest(name: str, ours: str) -> None:
    """The name dpm++ was answered with ddpm."""
    with pytest.raises(ValueError, match=f"did you mean {re.escape(ours)}\\?"):
        find_sampler(name)
    with pytest.raises(ValueError, match=f"did you mean {re.escape(ours)}\\?"):
        Request("a cat", sampler=name)
