"""train_clip.py: its images, its two losses, what it holds out and what it starts from."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from support.clips import SIDE, tiny_clip
from support.scripts import TWO, launch, run_here
from support.small_run import logged
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPProcessor

from latentdiff.data.config import DataConfig
from latentdiff.data.dataset import CaptionedImages
from latentdiff.data.shapes import build_shapes
from latentdiff.formats.weights import load_safetensors, save_safetensors
from latentdiff.options import compose
from latentdiff.tasks.clip.augmentation import blur, crop
from latentdiff.tasks.clip.config import TrainCLIP
from latentdiff.tasks.clip.loss import contrastive_loss
from latentdiff.tasks.clip.retrieval import validation_pool
from latentdiff.tasks.clip.start import check_captions
from latentdiff.training.randomness import MicroBatch
from latentdiff.training.validation import val_indices

BATCH, WIDTH = 6, 5


def test_a_blur_spreads_a_point_by_its_own_deviation_and_loses_nothing() -> None:
    sigma = torch.tensor([0.0, 0.7, 1.5], dtype=torch.float64)
    points = torch.zeros(3, 1, 33, 33, dtype=torch.float64)
    points[:, :, 16, 16] = 1
    blurred = blur(points, sigma, longest=1.5)
    assert torch.equal(blurred[0], points[0])
    away = torch.arange(-16, 17, dtype=torch.float64) ** 2
    for axis in (2, 3):
        variance = (blurred.sum(axis) * away).sum((1, 2))
        # A Gaussian that is sampled at whole pixels and cut at three deviations.
        torch.testing.assert_close(variance, sigma**2, rtol=0.03, atol=1e-12)
    torch.testing.assert_close(blurred.sum((1, 2, 3)), torch.ones(3, dtype=torch.float64))


def test_a_blur_leaves_what_is_of_one_colour_and_mixes_no_channels_or_images() -> None:
    colours = torch.rand(2, 3, 1, 1).expand(-1, -1, 8, 8)
    blurred = blur(colours, torch.tensor([1.0, 2.0]), longest=2.0)
    torch.testing.assert_close(blurred, colours, rtol=0, atol=1e-6)


def test_a_crop_of_the_whole_image_is_the_image() -> None:
    images = torch.randn(3, 3, 12, 12)
    cropped = crop(images, torch.rand(3, 3), scale=1.0)
    torch.testing.assert_close(cropped, images, rtol=0, atol=1e-5)


def test_a_crop_is_a_square_inside_the_image_enlarged() -> None:
    """Of images that show their own coordinates, from -1 to 1, as the crop's corners do."""
    size, scale = 16, 0.5
    along = (torch.arange(size) + 0.5) / size * 2 - 1
    images = torch.stack([along.expand(size, size), along[:, None].expand(size, size)])
    u = torch.tensor([[0.0, 0.0, 1.0], [0.5, 0.5, 0.25], [1.0, 0.3, 0.9], [0.2, 1.0, 0.0]])
    cropped = crop(images.expand(4, 2, size, size), u, scale=scale)
    for image, (u_side, x, y) in zip(cropped, u.tolist(), strict=True):
        side = scale + (1 - scale) * u_side
        for channel, middle in ((image[0], x), (image[1].T, y)):
            seen = side * along + (2 * middle - 1) * (1 - side)
            # Between the outermost pixels' middles and the edge is only the outermost pixel.
            expected = seen.clamp(float(along[0]), float(along[-1])).expand(size, size)
            torch.testing.assert_close(channel, expected, rtol=0, atol=1e-5)


def pairs() -> tuple[Tensor, Tensor, Any]:
    """A global batch's embeddings and what a loss asks of the towers, with leaves for gradients."""
    source = torch.Generator().manual_seed(3)
    rows = [torch.randn(BATCH, WIDTH, generator=source, dtype=torch.float64) for _ in range(2)]
    image, text = (F.normalize(x, dim=1).requires_grad_() for x in rows)
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (1.2, -2.0))
    return image, text, SimpleNamespace(logit_scale=scale, logit_bias=bias)


def loss_and_gradients(kind: str, rank: int, count: int) -> tuple[Tensor, list[Tensor]]:
    """The loss () of a process's local batch, and its full gradients."""
    image, text, clip = pairs()
    micro_batch = MicroBatch(rank, count)
    loss_of = contrastive_loss(kind, rank=rank, world_size=count)
    loss = loss_of(micro_batch.rows(image), micro_batch.rows(text), clip)
    loss.backward()
    leaves = [image, text, clip.logit_scale, clip.logit_bias]
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
    return loss.detach(), gradients


def test_softmax_asks_each_image_for_its_caption_and_each_caption_for_its_image() -> None:
    image, text, clip = pairs()
    logits = clip.logit_scale.exp() * image @ text.T
    own = -torch.log_softmax(logits, 1).diagonal() - torch.log_softmax(logits, 0).diagonal()
    torch.testing.assert_close(loss_and_gradients("softmax", 0, 1)[0], own.mean().detach() / 2)


def test_sigmoid_asks_of_each_pair_whether_it_is_one() -> None:
    """SigLIP, eq. 1: -1/B sum over i, j of log sigmoid(z_ij (t x_i · y_j + b))."""
    image, text, clip = pairs()
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(BATCH):
        for j in range(BATCH):
            logit = clip.logit_scale.exp() * (image[i] @ text[j]) + clip.logit_bias
            expected = expected - torch.log(torch.sigmoid(logit if i == j else -logit)) / BATCH
    expected.backward()
    loss, gradients = loss_and_gradients("sigmoid", 0, 1)
    torch.testing.assert_close(loss, expected.detach())
    leaves = (image, text, clip.logit_scale, clip.logit_bias)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(gradient, leaf.grad)


@pytest.mark.processes
def test_two_processes_have_the_loss_and_the_gradients_of_one(tmp_path: Path) -> None:
    """Means over the processes, as DDP takes them."""
    torch.multiprocessing.spawn(_process, (tmp_path,), nprocs=2)
    for kind in ("softmax", "sigmoid"):
        files = [load_safetensors(tmp_path / f"{kind}-{rank}.safetensors") for rank in range(2)]
        loss, gradients = loss_and_gradients(kind, 0, 1)
        for name, expected in zip("abcde", [loss, *gradients], strict=True):
            torch.testing.assert_close((files[0][name] + files[1][name]) / 2, expected)


def _process(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    for kind in ("softmax", "sigmoid"):
        loss, gradients = loss_and_gradients(kind, rank, 2)
        named = dict(zip("abcde", [loss, *gradients], strict=True))
        save_safetensors(named, folder / f"{kind}-{rank}.safetensors")
    dist.destroy_process_group()


TINY = (
    "--clip.text_width=16 --clip.text_layers=1 --clip.image_width=16 --clip.image_layers=1 "
    "--clip.projection_dim=8 --vocab_size=600 --max_steps=4 --contrastive=sigmoid"
)
COMMON = (
    "--caption_columns=[text,text_zh] --batch_size=8 --warmup_steps=2 --cooldown_steps=0 "
    "--log_every=1 --mixed_precision=no --val_fraction=0.2 --checkpoint_every=2 "
    "--preview_every=100 --validate_every=2 --image_size=16"
)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    build_shapes(folder, count=80, seed=0, size=32)
    return folder


def options(shapes: Path, folder: Path, *args: str) -> list[str]:
    return [*COMMON.split(), f"--data={shapes}", f"--output_dir={folder}", *args]


def train(shapes: Path, folder: Path, *args: str) -> None:
    """Run the script on shapes, in this process."""
    run_here("train_clip", *options(shapes, folder, *args))


def found(folder: Path) -> list[dict[str, float]]:
    return [record for record in logged(folder) if "retrieval_text@1" in record]


@pytest.fixture(scope="module")
def whole(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by the sigmoid loss."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(shapes, folder, *TINY.split())
    return folder


@pytest.mark.training
def test_the_sigmoids_bias_is_learned_and_lies_beside_a_plain_clip(whole: Path) -> None:
    state = load_safetensors(whole / "checkpoints" / "step-4" / "clip.safetensors")
    bias = state["ema.logit_bias"]
    assert state["model.logit_bias"] not in (bias, -10.0)
    clip, loaded = CLIPModel.from_pretrained(whole / "model" / "clip", output_loading_info=True)
    assert not any(loaded.values())
    assert clip.config.logit_bias == float(bias)
    assert all(torch.equal(v, state[f"ema.{name}"]) for name, v in clip.state_dict().items())
    assert CLIPProcessor.from_pretrained(whole / "model" / "clip").tokenizer.model_max_length == 24


@pytest.mark.processes
def test_it_resumes_bit_for_bit_and_two_processes_train_as_one(
    whole: Path, shapes: Path, tmp_path: Path
) -> None:
    """The same weights and retrieval after a break at step 2; sums in another order in two."""
    train(shapes, tmp_path / "one", *TINY.split(), "--max_steps=2")
    launch(TWO, "train_clip", *options(shapes, tmp_path / "two", *TINY.split()))
    train(shapes, tmp_path / "one", *TINY.split())
    file = Path("checkpoints") / "step-4" / "clip.safetensors"
    assert (tmp_path / "one" / file).read_bytes() == (whole / file).read_bytes()
    assert found(tmp_path / "one") == found(whole)
    assert [record["step"] for record in found(whole)] == [2, 4]
    assert found(tmp_path / "two") == found(whole)
    steps = [[r for r in logged(path) if "loss" in r] for path in (tmp_path / "two", whole)]
    for two, one in zip(*steps, strict=True):
        for name in ("loss", "accuracy", "grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-4), name


@pytest.mark.training
def test_a_run_starts_from_a_clip_and_finds_what_that_one_does(
    shapes: Path, tmp_path: Path
) -> None:
    """Without a learning rate worth the name: the pool as it is, whatever training sees."""
    tiny_clip(tmp_path / "source")
    still = ["--init", str(tmp_path / "source"), "--max_steps=1", "--learning_rate=1e-30"]
    augmented = ["--crop_scale=0.5", "--blur=2", "--noise=1"]
    train(shapes, tmp_path / "plain", *still, "--crop_scale=1")
    train(shapes, tmp_path / "other", *still, *augmented)
    source = CLIPModel.from_pretrained(tmp_path / "source")
    for name, tensor in (
        CLIPModel.from_pretrained(tmp_path / "other/model/clip").state_dict().items()
    ):
        torch.testing.assert_close(tensor, source.state_dict()[name], rtol=0, atol=1e-12)
    written = json.loads((tmp_path / "other/model/clip/preprocessor_config.json").read_text())
    asked = json.loads((tmp_path / "source/preprocessor_config.json").read_text())
    assert [written[key] for key in ("image_mean", "image_std")] == [
        asked[key] for key in ("image_mean", "image_std")
    ]
    (plain,), (other,) = found(tmp_path / "plain"), found(tmp_path / "other")
    assert plain == other
    config = DataConfig(data=str(shapes), image_size=SIDE, caption_columns=("text", "text_zh"))
    dataset = CaptionedImages(config)
    numbers = val_indices(len(dataset), 0.2, seed=0).tolist()
    dataset.validation = frozenset(numbers)
    pool = validation_pool(dataset, seed=0)
    assert pool is not None
    assert len(pool.images) == len(numbers) == int(0.2 * len(dataset))
    processor = CLIPProcessor.from_pretrained(tmp_path / "source")
    words = processor.tokenizer(
        list(pool.captions), padding="max_length", truncation=True, return_tensors="pt"
    )
    values = processor.image_processor(list(pool.images), return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = source(input_ids=words.input_ids, pixel_values=values)
    recalls = pool.recall(expected.image_embeds, expected.text_embeds)
    assert {name: float(recall) for name, recall in recalls.items()} == {
        name: value for name, value in plain.items() if name != "step"
    }


@pytest.mark.training
def test_a_stream_has_no_validation_split_which_is_said(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(shapes, tmp_path / "run", *TINY.split(), "--max_steps=1", "--stream=true")
    assert "a stream has no images to hold out" in capsys.readouterr().out
    assert found(tmp_path / "run") == []
    assert "num_val" not in json.loads((tmp_path / "run" / "data.json").read_text())


def tokens(texts: list[str]) -> Tensor:
    """The first two letters of each text, (n, 2)."""
    return torch.tensor([[ord(letter) for letter in text[:2]] for text in texts])


def test_captions_that_are_all_alike_are_refused() -> None:
    """Every caption is then as right as another: the loss stayed where it was, for ever."""
    alike = [["a cat"], ["a dog"], ["a house"]]  # in the tokens that are read
    with pytest.raises(ValueError, match=r"alike in the first 2 tokens, such as 'a cat'"):
        check_captions(alike, tokens)
    both = [["cat", "dog"], ["dog", "cat"]]
    with pytest.raises(ValueError, match="the captions of all images are alike"):
        check_captions(both, tokens)
    check_captions([*alike, ["the cat"]], tokens)
    check_captions([["cat", "dog"], ["dog"]], tokens)


@pytest.mark.training
@pytest.mark.parametrize("stream", ["true", "false"])
def test_the_script_refuses_captions_that_are_all_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stream: str
) -> None:
    (tmp_path / "set").mkdir()
    for i in range(10):
        Image.new("RGB", (16, 16), (i, i, i)).save(tmp_path / "set" / f"{i}.png")
    same = '"text": "a photo", "text_zh": "照片"'
    lines = [f'{{"file_name": "{i}.png", {same}}}\n' for i in range(10)]
    (tmp_path / "set" / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    with pytest.raises(SystemExit) as caught:
        train(tmp_path / "set", tmp_path / "run", *TINY.split(), f"--stream={stream}")
    assert caught.value.code == 2
    assert "the captions of all images are alike" in capsys.readouterr().err


def test_a_batch_of_one_is_refused() -> None:
    """Its loss is 0 and stays so, since there is no other caption to compare with."""
    for kind in ("softmax", "sigmoid"):
        with pytest.raises(ValueError, match=r"^batch_size=1 must be at least 2: the contrastive"):
            compose(TrainCLIP, {"batch_size": 1, "contrastive": kind})
    compose(TrainCLIP, {"batch_size": 2})


def test_a_fraction_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"val_fraction=1\.0 must be in \[0, 1\)"):
        TrainCLIP(val_fraction=1.0)
