"""The search for the first number that is not finite."""

import pytest
import torch
from torch import nn

from latentdiff.training.nonfinite import first_nonfinite_module


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Tanh(), nn.Linear(2, 2)), nn.ReLU())


def test_the_first_module_is_named_that_made_a_bad_number() -> None:
    model = network()
    model[1][1].weight.data[0, 0] = torch.inf
    with first_nonfinite_module({"unet": model}) as found:
        model(torch.ones(3, 2))
    assert found == ["the output of unet.1.1 (Linear)"]


def test_a_bad_input_is_told_from_a_bad_module() -> None:
    model = network()
    with first_nonfinite_module({"unet": model}) as found:
        model(torch.full((3, 2), torch.nan))
    assert found == ["the input of unet"]


def test_nothing_is_found_where_all_is_finite_and_nothing_is_left_behind() -> None:
    model = network()
    with first_nonfinite_module({"unet": model}) as found:
        model(torch.ones(3, 2))
    assert found == []
    model(torch.full((3, 2), torch.nan))
    assert found == []


@pytest.mark.parametrize("value", [{"a": [torch.tensor(torch.inf)]}, (torch.tensor(torch.nan), 1)])
def test_numbers_are_found_inside_of_what_modules_pass_on(value: object) -> None:
    class Passing(nn.Module):
        def forward(self, x: object) -> object:
            return x

    model = Passing()
    with first_nonfinite_module({"net": model}) as found:
        model(value)
    assert found == ["the input of net"]
