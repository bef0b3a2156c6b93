"""The ways for a judge to look at images: by a network, by colours and edges, by a CLIP's tower."""

from pathlib import Path
from typing import NamedTuple

import torch

from latentdiff.evaluation.edges import edge_features
from latentdiff.evaluation.features import Features
from latentdiff.evaluation.judge import VERSION, Look
from latentdiff.evaluation.network import SHA256, Network
from latentdiff.models.fingerprint import fingerprint


class NamedLook(NamedTuple):
    """Features of images, and what they are of: two judges with one description say the same."""

    look: Look
    description: str


def find_look(name: str, *, whole: bool = False, device: torch.device | None = None) -> NamedLook:
    """The way that a name means: "network", "edges", or the folder of a CLIP.

    `whole` asks a network for what there is in an image rather than for what is where, as distances
    of sets do. A network is put on `device`, or without one on an accelerator, if there is any.
    Raises ValueError for a folder without a CLIP, and where the network is missing.
    """
    if name == "network":
        network = Network(device)
        look = network.whole if whole else network.places
        return NamedLook(look, f"EfficientNet-Lite0 {SHA256[:12]}, {look.__name__}, {VERSION}")
    if name == "edges":
        return NamedLook(edge_features, f"colours and edges, {VERSION}")
    features = Features.from_pretrained(Path(name), device=device)
    return NamedLook(features, f"CLIP {fingerprint(features.clip, {})[:12]}, {VERSION}")
