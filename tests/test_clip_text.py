"""The text tower: transformers' numbers and names."""

import copy

import pytest
import torch
from support.parity import difference, gradients
from transformers import CLIPTextConfig, CLIPTextModel

from latentdiff.models.clip_text import ACTIVATIONS, CLIPText
from latentdiff.models.text import fill_tower


def config_of(activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=50,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=20,
        hidden_act=activation,
        layer_norm_eps=1e-4,
        initializer_factor=5.0,
    )


def towers(activation: str) -> tuple[CLIPText, CLIPTextModel]:
    torch.manual_seed(0)
    config = config_of(activation)
    theirs = CLIPTextModel(config).double()
    return fill_tower(CLIPText(config), copy.deepcopy(theirs.state_dict())), theirs


@pytest.mark.parametrize("length", [1, 13, 20])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_states_and_gradients_are_those_of_transformers(activation: str, length: int) -> None:
    ours, theirs = towers(activation)
    ids = torch.randint(50, (3, length))
    states, expected = ours(ids), theirs(input_ids=ids).last_hidden_state
    assert difference({"states": states}, {"states": expected}) < 1e-12
    found = gradients(states, ours, [])
    assert difference(found, gradients(expected, theirs, [])) < 1e-12


@torch.no_grad()
def test_a_state_depends_on_no_later_token() -> None:
    ours, _ = towers("quick_gelu")
    ids = torch.randint(50, (1, 20))
    states = ours(ids)
    ids[0, 12:] = torch.randint(50, (8,))
    torch.testing.assert_close(ours(ids)[:, :12], states[:, :12])
    assert not torch.allclose(ours(ids)[:, 12:], states[:, 12:])
