"""Blocks: checkpointing and compiling change no number, and checkpointing saves memory."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from support.runs import make_learner
from support.runs import options as compose_options
from support.tiny import ONE_WIDTH, UNET, randomise
from torch import Tensor, nn
from transformers import CLIPTextConfig

from latentdiff.models.clip_text import CLIPText
from latentdiff.models.dit import DiT, DiTConfig
from latentdiff.models.unet import UNet
from latentdiff.models.vae import VAE, VAEConfig
from latentdiff.planning.footprint import Workload, footprint
from latentdiff.training.accelerator import check_compile
from latentdiff.training.blocks import blocks, checkpoint_activations, compile_blocks
from latentdiff.training.learner import Learner

DIT = DiTConfig(num_layers=3, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16)


def unet() -> UNet:
    return UNet(UNET)


def dit() -> DiT:
    return DiT(DIT)


def joint_dit() -> DiT:
    return DiT(replace(DIT, attention="joint", pooled_text=True))


def vae() -> VAE:
    return VAE(VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4))


def text() -> CLIPText:
    config = CLIPTextConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=12,
    )
    return CLIPText(config)


def loss_of(network: nn.Module, count: int = 3) -> Tensor:
    draw = torch.Generator().manual_seed(5)
    if isinstance(network, UNet | DiT):
        x = torch.randn(count, 4, 8, 8, generator=draw)
        context = torch.randn(count, 5, 16, generator=draw)
        return network(x, torch.arange(count), context).square().mean()
    if isinstance(network, VAE):
        images = torch.randn(count, 3, 16, 16, generator=draw)
        noise = torch.randn(count, 4, 8, 8, generator=draw)
        return network(images, noise)[0].square().mean()
    ids = torch.randint(50, (count, 12), generator=draw)
    return network(ids).square().mean()


@pytest.mark.parametrize("make", [unet, dit, joint_dit, vae, text])
@pytest.mark.parametrize("mixed", [False, True])
def test_checkpointed_gradients_have_the_same_bits(make, mixed: bool) -> None:
    plain = make().train()
    randomise(plain)
    other = copy.deepcopy(plain)
    checkpoint_activations(other)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        expected, found = loss_of(plain), loss_of(other)
    assert found.equal(expected)
    expected.backward()
    found.backward()
    for (name, p), q in zip(plain.named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or q.grad is None or p.grad.equal(q.grad), name
    assert blocks(other)


@pytest.mark.exhaustive
def test_checkpointing_saves_fewer_activations() -> None:
    def loss(model, frozen, n: int) -> Tensor:
        return model(
            torch.zeros(n, 4, 8, 8), torch.zeros(n, dtype=torch.long), torch.zeros(n, 5, 16)
        ).mean()

    def checkpointed() -> UNet:
        network = unet()
        checkpoint_activations(network)
        return network

    plain, less = (footprint(Workload(make, loss), 4) for make in (unet, checkpointed))
    assert less.activations < 0.5 * plain.activations
    assert less.num_parameters == plain.num_parameters
    # Everything but the blocks runs once: less than a full forward pass comes on top.
    assert 1.1 < less.step_flop / plain.step_flop < 4 / 3


def test_a_learner_trains_the_same_with_gradient_checkpointing() -> None:
    network = unet()
    randomise(network)
    plain, other = (
        make_learner(
            copy.deepcopy(network),
            learning_rate=1e-2,
            warmup_steps=0,
            gradient_checkpointing=flag,
        )
        for flag in (False, True)
    )
    for learner in (plain, other):
        for _ in range(3):
            learner.update(loss_of(learner.model))
    expected = plain.tensors()
    assert {n: t.equal(expected[n]) for n, t in other.tensors().items()} == dict.fromkeys(
        expected, True
    )


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resuming_in_channels_last_is_bitwise(optimizer: str) -> None:
    """A checkpoint's tensors are contiguous; moments must take the weights' memory format."""
    network = unet()
    randomise(network)

    def learner() -> Learner:
        changes: dict[str, Any] = {"optimizer": optimizer, "learning_rate": 1e-2}
        return make_learner(copy.deepcopy(network), warmup_steps=0, compile=True, **changes)

    def train(subject: Learner, steps: int) -> None:
        for _ in range(steps):
            subject.update(loss_of(subject.model))

    straight, stopped, resumed = learner(), learner(), learner()
    with torch.compiler.set_stance("force_eager"):
        train(straight, 4)
        train(stopped, 2)
        saved = {name: tensor.contiguous() for name, tensor in stopped.tensors().items()}
        resumed.load_tensors(saved, num_updates=2)
        train(resumed, 2)
    weight = resumed.model.get_parameter("down_blocks.0.resnets.0.conv1.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    expected = straight.tensors()
    assert {n: t.equal(expected[n]) for n, t in resumed.tensors().items()} == dict.fromkeys(
        expected, True
    )


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_compiled_blocks_give_the_same_numbers_up_to_rounding(
    memory_format: torch.memory_format,
) -> None:
    plain = unet().train()
    randomise(plain)
    other = copy.deepcopy(plain)
    other.to(memory_format=memory_format)  # pyright: ignore[reportCallIssue] # no overload has it
    checkpoint_activations(other)
    compile_blocks(other)
    torch.use_deterministic_algorithms(False)  # which fill new memory, and compiled code with it
    expected, found = loss_of(plain), loss_of(other)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    expected.backward()
    found.backward()
    for (name, p), q in zip(plain.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")  # by dynamo
def test_a_network_compiled_as_a_whole_trains_as_it_does_uncompiled() -> None:
    """Under accelerate's autocast, which wraps what is compiled."""
    network = UNet(ONE_WIDTH).train()
    randomise(network)
    torch.use_deterministic_algorithms(False)  # which fill new memory, and compiled code with it

    def losses(**changes: Any) -> list[float]:
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        changes |= {"learning_rate": 1e-3, "warmup_steps": 0}
        learner = make_learner(copy.deepcopy(network), accelerator, **changes)
        found = []
        for _ in range(3):
            x, context = torch.full((2, 4, 8, 8), 0.5), torch.full((2, 5, 16), 0.1)
            output = learner.forward_model(x, torch.arange(2), context)
            loss = (output.float() - 1).square().mean()
            learner.update(loss)
            found.append(loss.item())
        return found

    plain, compiled = losses(), losses(compile="network")
    assert plain[2] < plain[0]
    assert compiled == pytest.approx(plain, rel=2e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile": "network", "sharding": "full"}, "compile='network' must be true or false"),
        (
            {"compile": "graph", "gradient_accumulation_steps": 2},
            "compile='graph' must be 'network', true or false with gradient_accumulation_steps=2",
        ),
    ],
)
def test_a_way_of_compiling_that_does_not_go_is_refused(
    options: dict[str, Any], message: str
) -> None:
    config = compose_options(**options)
    with pytest.raises(ValueError, match=message):
        check_compile(config.compute, config.parallel)
