"""Batches on the CPU: each image has the bits that it has alone, whatever the kernels do."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.tiny import CONTEXT_DIM, TOKENS, UNET, Recording, tiny_pipeline
from torch import Tensor, nn

from latentdiff.guidance import Evaluate
from latentdiff.models.layers import Conv1x1
from latentdiff.models.unet import UNet
from latentdiff.tiles import TILE, exact, tiles


def test_tiles_hold_every_row_once_and_are_never_larger() -> None:
    for count in (1, TILE, TILE + 1, 3 * TILE - 1):
        found = tiles(range(count))
        assert [row for tile in found for row in tile] == list(range(count))
        assert max(map(len, found)) <= TILE


def evaluator(
    noise: Callable[[int, int], float], calls: list[int], halves: int = 2
) -> Callable[[tuple[int, ...]], Evaluate]:
    """Evaluations whose result is off by `noise(images, position)`, as kernels' rounding is."""

    def make(rows: tuple[int, ...]) -> Evaluate:
        def evaluate(x: Tensor, timestep: Tensor) -> Tensor:
            calls.append(len(x))
            off = torch.tensor([noise(len(rows), k) for k in range(len(rows))])
            output = x * timestep + torch.tensor(rows)[:, None] + off[:, None]
            return torch.cat([output + half for half in range(halves)])

        return evaluate

    return make


@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize(
    ("noise", "later"),
    [
        (lambda images, position: 0.0, [3]),
        (lambda images, position: 0.25 * (images > 1), [1, 1, 1]),
        (lambda images, position: 0.25 * (images > 1 and position == images - 1), [1, 1, 1]),
    ],
    ids=["no difference", "in batches", "in the last row of batches"],
)
def test_what_would_differ_is_evaluated_one_by_one(
    noise: Callable[[int, int], float], later: list[int], halves: int
) -> None:
    calls: list[int] = []
    make, rows, x = evaluator(noise, calls, halves), (4, 7, 2), torch.randn(3, 5)
    evaluate, t = exact(make, rows), torch.tensor(3.0)
    alone = [make((row,))(x[i : i + 1], t) for i, row in enumerate(rows)]
    expected = torch.cat([output[half : half + 1] for half in range(halves) for output in alone])
    assert evaluate(x, t).equal(expected)
    calls.clear()
    assert evaluate(x, t).equal(expected)
    assert calls == later


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(128, 256, 16), (320, 320, 24), (512, 192, 5)])
@torch.no_grad()
def test_a_1x1_convolution_of_an_image_has_the_bits_that_it_has_alone(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """And is the convolution that is differentiated, within rounding."""
    wide, out, side = shape
    conv, x = Conv1x1(wide, out, 1).to(dtype), torch.randn(9, wide, side, side).to(dtype)
    together = conv(x)
    for size in (1, 2, 4):
        assert all(
            conv(part).equal(together[i * size : (i + 1) * size])
            for i, part in enumerate(x.split(size))
        )
    with torch.enable_grad():
        torch.testing.assert_close(conv(x), together)


@torch.no_grad()
def test_no_other_prompt_changes_the_embedded_times_of_one() -> None:
    unet = UNet(replace(UNET, addition_embed_type="text", addition_embed_type_num_heads=2))
    contexts, times = torch.randn(7, TOKENS, CONTEXT_DIM), torch.tensor([1.0, 10.0, 100.0])
    together = unet.prepare_times(times, contexts, dtype=torch.float32)
    for i, context in enumerate(contexts.split(1)):
        alone = unet.prepare_times(times, context, dtype=torch.float32)
        for shifts, of_one in zip(together, alone, strict=True):
            assert all(s[i : i + 1].equal(one) for s, one in zip(shifts, of_one, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_beside_others_have_the_bits_that_they_have_alone(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """By every option of guidance that sums over an image, and beyond one tile."""
    pipe = Recording(**tiny_pipeline(tmp_path).to(dtype).components._asdict())
    prompts, seeds = [f"a {i}" for i in range(TILE + 2)], [*range(50, 52 + TILE)]
    for options in (
        {"guidance_rescale": 0.7},
        {"guidance_eta": 0.3, "guidance_momentum": -0.5, "guidance_norm_threshold": 1.0},
        {"guidance_interval": (0.5, 5.0)},
    ):
        options |= {"steps": 4, "guidance_scale": 3.0, "progress": False}
        pipe(prompts, seed=seeds, **options)
        together = pipe.latents
        for i in (0, 3, TILE - 1, TILE, TILE + 1):
            pipe(prompts[i], seed=seeds[i], **options)
            assert pipe.latents[0].equal(together[i])


def test_a_batch_is_evaluated_as_one_where_no_bit_changes(tmp_path: Path) -> None:
    """Bitwise equal kernels are not promised, so that a network of none stands for them."""
    pipe, rows = tiny_pipeline(tmp_path), list[int]()

    class Pointwise(nn.Module):
        def __init__(self, unet: nn.Module) -> None:
            super().__init__()
            self.unet, self.config, self.multiple = unet, unet.config, 1

        def prepare_context(self, context: Tensor) -> Tensor:
            return context.mean((1, 2))[:, None, None, None]

        def prepare_times(self, timesteps: Tensor, context: Tensor, *, dtype: torch.dtype):
            return [(t[None, None, None, None],) for t in timesteps]

        def forward(self, x: Tensor, times: tuple[Tensor, ...], context: Tensor) -> Tensor:
            rows.append(len(context))
            return x.repeat(len(context) // len(x), 1, 1, 1) * context + times[0] / 1000

    pipe.unet = Pointwise(pipe.unet)  # pyright: ignore[reportAttributeAccessIssue] # a stand-in
    pipe(["a"] * 5, steps=3, guidance_scale=3.0, progress=False)
    assert rows == [10, 2, 2, 10, 10]
