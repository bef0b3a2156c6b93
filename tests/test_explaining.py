"""What `explain` records: the numbers of a drawing, which it leaves as they are."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from support.command import run
from support.tiny import tiny_pipeline

from latentdiff.diffusion import Diffusion
from latentdiff.explaining import draw_figure, explain
from latentdiff.explaining.attention import AttentionMaps, recorded, words
from latentdiff.models.layers import Attention
from latentdiff.pipeline import Pipeline

OPTIONS = {"steps": 4, "seed": 3, "progress": False}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return tiny_pipeline(tmp_path_factory.mktemp("tokens"))


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 1.0}, {"sampler": "dpmpp_2m"}])
def test_the_image_has_the_same_bits_with_and_without_recording(
    pipe: Pipeline, options: dict[str, object]
) -> None:
    found = explain(pipe, "a cat", **OPTIONS | options)
    image = pipe("a cat", **OPTIONS | options).images[0]
    assert found.image.tobytes() == image.tobytes()
    hooks = [m for m in pipe.unet.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []
    again = pipe("a cat", **OPTIONS | options).images[0]
    assert again.tobytes() == image.tobytes()


def test_attention_is_a_share_of_all_tokens_at_each_place(pipe: Pipeline) -> None:
    maps = AttentionMaps((8, 8))
    with recorded(pipe.unet, maps):
        pipe("a cat", **OPTIONS)
    assert maps.mean.shape == (12, 8, 8)
    torch.testing.assert_close(maps.mean.sum(dim=0), torch.ones(8, 8))
    found = explain(pipe, "a cat", **OPTIONS)
    shares = sum(float(part.mean()) for _, part in found.words) + found.rest
    assert shares == pytest.approx(1)
    assert [word for word, _ in found.words] == ["a", "cat"]


def test_attention_is_that_by_which_the_layer_weighs_its_values() -> None:
    torch.manual_seed(0)
    layer = Attention(16, heads=1, context_dim=6)
    x, context = torch.randn(1, 64, 16), torch.randn(1, 12, 6)
    maps = AttentionMaps((8, 8))
    with recorded(torch.nn.ModuleDict({"attn2": layer}), maps), torch.no_grad():
        output = layer(x, context)
        weighed = maps.mean.flatten(1).T @ layer.to_v(context)[0]
        torch.testing.assert_close(layer.to_out[0](weighed)[None], output)


def test_odd_sizes_find_their_place_and_a_halved_map_keeps_its_sums() -> None:
    maps = AttentionMaps((5, 3))
    maps.add(torch.randn(3 * 2, 7).softmax(dim=-1))  # (5, 3) halved, rounded up
    maps.add(torch.randn(5 * 3, 7).softmax(dim=-1))
    torch.testing.assert_close(maps.mean.sum(dim=0), torch.ones(5, 3))


def test_words_have_the_positions_of_their_tokens_in_every_chunk(pipe: Pipeline) -> None:
    tokenizer = pipe.text_encoder.tokenizer  # a token a letter, twelve to a chunk
    found = words("abc defghijkl mn", tokenizer)
    assert [word for word, _ in found] == ["abc", "defghijkl", "mn"]
    assert found[0][1] == [1, 2, 3]
    assert found[1][1] == list(range(13, 22))  # a word is not torn in two
    explained = explain(pipe, "abc defghijkl mn", **OPTIONS)
    assert 0 < explained.rest < 1


def test_guidance_is_the_difference_of_both_predictions(pipe: Pipeline) -> None:
    found = explain(pipe, "a cat", **OPTIONS)
    assert found.guidance.shape == (4,)
    assert (found.guidance > 0).all()
    assert len(found.noisy) == len(found.predicted) == len(found.unconditional) == 4
    off = explain(pipe, "a cat", guidance_scale=1.0, **OPTIONS)
    assert (off.guidance == 0).all()
    assert off.unconditional == []
    assert [one.tobytes() for one in off.predicted] == [one.tobytes() for one in off.conditional]


def test_predictions_are_those_of_the_samplers_steps(pipe: Pipeline) -> None:
    """Unguided, what the network predicts at x_t is the estimate that the run yields."""
    options = {**OPTIONS, "guidance_scale": 1.0}
    streamed = list(pipe.stream("a cat", **options))
    found = explain(pipe, "a cat", **options)
    assert [one.tobytes() for one in found.predicted[:-1]] == [
        images[0].tobytes() for images in streamed[:-1]
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_images": 2}, "one image can be explained at a time, not 2"),
        ({"sampler": "heun"}, "sampler=heun evaluates the network 7 times in 4 steps; choose"),
        ({"image": Image.new("RGB", (16, 16))}, "image: what is explained is drawn from noise"),
        ({"prompt_weighting": True}, "prompt_weighting=True: words with weights"),
    ],
)
def test_what_cannot_be_explained_is_refused(
    pipe: Pipeline, options: dict[str, object], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        explain(pipe, "a cat", **OPTIONS | options)


def test_a_beta_schedule_and_a_figure_without_guidance(tmp_path: Path) -> None:
    pipe = tiny_pipeline(tmp_path, Diffusion("scaled_linear", "epsilon"))
    figure = draw_figure(explain(pipe, "一只猫", guidance_scale=1.0, **OPTIONS))
    assert "guidance is off" in [t.get_text() for axes in figure.axes for t in axes.texts]


def test_the_command_writes_a_figure(
    pipe: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe.save_pretrained(tmp_path / "model")
    model = ("--model", str(tmp_path / "model"), "--steps", "2")
    assert run("explain", "a cat", *model, "--out", str(tmp_path / "cat.png")) == 0
    assert str(tmp_path / "cat.png") in capsys.readouterr().out
    with Image.open(tmp_path / "cat.png") as image:
        assert image.width > 400
    assert run("explain", "a cat", *model, "--out", str(tmp_path / "cat.svg")) == 0
    assert "<svg" in (tmp_path / "cat.svg").read_text(encoding="utf-8")
    assert run("explain", "a cat", *model, "--out", str(tmp_path / "cat.gif")) == 2
    assert "must end in one of .png, .svg, .pdf" in capsys.readouterr().err
