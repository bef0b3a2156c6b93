"""LoHa, LoKr and DoRA of random numbers, with LyCORIS' formulas of them written out."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from latentdiff.pipeline import Pipeline
from support.loras import TEXT, UNET, Tensors

Change = tuple[Tensors, Tensor]  # tensors by the ends of their names, and what they add to a weight
RANK = 2


class Random:
    """Random numbers in half precision, which every trainer writes, as float64."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return (0.5 * torch.randn(shape, generator=self.generator)).half().double()


def lora(random: Random, weight: Tensor, alpha: float) -> Change:
    out, channels, *kernel = weight.shape
    down, up = random(RANK, channels, *kernel), random(out, RANK)
    tensors = {
        "lora_down.weight": down,
        "lora_up.weight": up.reshape(*up.shape, *[1 for _ in kernel]),
    }
    return tensors, alpha / RANK * torch.einsum("or,r...->o...", up, down)


def loha(random: Random, weight: Tensor, alpha: float) -> Change:
    out, inner = len(weight), weight[0].numel()
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    a, b, c, d = random(out, RANK), random(RANK, inner), random(out, RANK), random(RANK, inner)
    change = alpha / RANK * (a @ b) * (c @ d)
    return dict(zip(names, (a, b, c, d), strict=True)), change.reshape(weight.shape)


def loha_with_cores(random: Random, weight: Tensor, alpha: float) -> Change:
    out, channels, *kernel = weight.shape
    if not kernel:
        return loha(random, weight, alpha)
    tensors, halves = {}, []
    for i in (1, 2):
        core, a, b = random(RANK, RANK, *kernel), random(RANK, out), random(RANK, channels)
        tensors |= {f"hada_t{i}": core, f"hada_w{i}_a": a, f"hada_w{i}_b": b}
        halves.append(torch.einsum("ijkl,jr,ip->prkl", core, b, a))
    return tensors, alpha / RANK * halves[0] * halves[1]


def lokr(
    random: Random, weight: Tensor, alpha: float, *, left: bool, right: bool, core: bool = False
) -> Change:
    """`left` and `right` are products of two matrices, or else whole."""
    out, channels, *kernel = weight.shape
    a, c = (4, 2) if channels % 2 == 0 else (4, 1)  # out is four times a whole number everywhere
    b, d = out // a, channels // c
    tensors: Tensors = {}
    if left:
        tensors |= {"lokr_w1_a": random(a, RANK), "lokr_w1_b": random(RANK, c)}
        w1 = tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
    else:
        w1 = tensors["lokr_w1"] = random(a, c)
    if right and core and kernel:
        tensors |= {"lokr_t2": random(RANK, RANK, *kernel)}
        tensors |= {"lokr_w2_a": random(RANK, b), "lokr_w2_b": random(RANK, d)}
        w2 = torch.einsum(
            "ijkl,ip,jr->prkl", *(tensors[f"lokr_{n}"] for n in ("t2", "w2_a", "w2_b"))
        )
    elif right:
        inner = weight[0, 0].numel() * d
        tensors |= {"lokr_w2_a": random(b, RANK), "lokr_w2_b": random(RANK, inner)}
        w2 = (tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]).reshape(b, d, *kernel)
    else:
        w2 = tensors["lokr_w2"] = random(b, d, *kernel)
    # LyCORIS takes no notice of the alpha of two whole matrices, nor do ComfyUI and A1111.
    scale = alpha / RANK if left or right else 1
    return tensors, scale * torch.einsum("ac,bd...->abcd...", w1, w2).reshape(weight.shape)


CHANGES: dict[str, Callable[[Random, Tensor, float], Change]] = {
    "LoRA": lora,
    "LoHa": loha,
    "LoHa with cores": loha_with_cores,
    "LoKr of whole matrices": lambda *a: lokr(*a, left=False, right=False),
    "LoKr, right factored": lambda *a: lokr(*a, left=False, right=True),
    "LoKr, both factored": lambda *a: lokr(*a, left=True, right=True),
    "LoKr with a core": lambda *a: lokr(*a, left=False, right=True, core=True),
}
AXES = (None, 0, 1)  # of DoRA's magnitude: none, of the outputs, of the inputs
ALL = [(name, axis) for name in CHANGES for axis in AXES]


def with_dora(random: Random, weight: Tensor, change: Change, axis: int | None) -> Change:
    """The change with a magnitude, that of the weight times about one."""
    tensors, plain = change
    if axis is None:
        return change
    others = [i for i in range(weight.ndim) if i != axis]
    magnitude = weight.square().sum(others, keepdim=True).sqrt()
    magnitude = (magnitude * (1 + 0.3 * random(*magnitude.shape))).float()
    norm = (weight + plain).square().sum(others, keepdim=True).sqrt()
    changed = (weight + plain) * magnitude.double() / norm
    return tensors | {"dora_scale": magnitude}, changed - weight


def random_change(
    network: nn.Module, names: list[str], kinds: list[tuple[str, int | None]], *, seed: int
) -> tuple[dict[str, Tensors], Tensors]:
    """Tensors by layer, of one kind after another, and the changes of the weights by layer.

    The network is in float64; `names` are the ends of its layers' names.
    """
    random, tensors, changes = Random(seed), {}, {}
    found = [
        (name, module.weight.detach())
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and name.endswith(tuple(names))
    ]
    for i, (name, weight) in enumerate(found):
        (kind, axis), alpha = kinds[i % len(kinds)], (0.5, 1.0, 3.0)[i % 3]
        change = CHANGES[kind](random, weight, alpha)
        tensors[name], changes[name] = with_dora(random, weight, change, axis)
        tensors[name]["alpha"] = torch.tensor(alpha)
    return tensors, changes


def in_lycoris_names(tensors: dict[str, Tensors], prefix: str = "lora_unet_") -> Tensors:
    """As LyCORIS writes them: in half precision, but for the magnitudes."""
    return {
        f"{prefix}{layer.replace('.', '_')}.{kind}": t if kind == "dora_scale" else t.half()
        for layer, some in tensors.items()
        for kind, t in some.items()
    }


def lycoris_file(
    path: Path, pipeline: Pipeline, kinds: list[tuple[str, int | None]] = ALL, *, seed: int = 0
) -> tuple[Path, list[dict[str, Tensor]]]:
    """Write a file of these kinds, layer by layer; and what it adds to both networks' weights."""
    unet, unet_changes = random_change(pipeline.unet, UNET, kinds, seed=seed)
    text, text_changes = random_change(pipeline.text_encoder.model, TEXT, kinds, seed=seed + 1)
    tower = {name.removeprefix("text_model."): tensors for name, tensors in text.items()}
    save_file(in_lycoris_names(unet) | in_lycoris_names(tower, "lora_te_text_model_"), path)
    return path, [unet_changes, text_changes]
