"""The work of `latentdiff eval vae`: what a VAE allows, the ceiling of all that draw with it."""

import argparse
import hashlib
from pathlib import Path

import numpy as np
import torch

from latentdiff.cli.drawing import load_pipeline
from latentdiff.data.folder import check_side
from latentdiff.device import find_device
from latentdiff.evaluation.ceiling import mean_psnr, through_vae
from latentdiff.evaluation.judge import Judge
from latentdiff.evaluation.kept_features import kept_features
from latentdiff.evaluation.looks import find_look
from latentdiff.evaluation.references import read_references
from latentdiff.evaluation.results import Figure, Result, check_result_path, write_result
from latentdiff.evaluation.shares import share
from latentdiff.formats.diffusers import find_component
from latentdiff.models.vae import VAE


def judge_vae(arguments: argparse.Namespace) -> None:
    """Say how near true images come through a VAE, and what share is right; see its --help."""
    if arguments.count < 1:
        raise ValueError(f"count={arguments.count} must be at least 1")
    if arguments.image_size is not None:
        check_side(arguments.image_size, name="image_size")
    check_result_path(arguments.out)
    device = find_device(arguments.device)
    named = find_look(arguments.judge, device=device)
    vae = load_vae(arguments.model, device)
    size = arguments.image_size
    true = read_references(
        arguments.data,
        image_size=vae.config.sample_size if size is None else size,
        concept=arguments.concept_column,
        style=arguments.style_column,
    )
    wanted = np.random.default_rng(0).permutation(len(true))[: arguments.count].tolist()
    images = list(through_vae(vae, true, wanted))
    path = arguments.reference_features
    features = None if path is None else kept_features(path, named, true)
    verdicts = Judge(named.look, true, features=features)(images, wanted)
    psnr = mean_psnr(images, true, wanted)
    figures = {"concept": share(verdicts.concept_right), "style": share(verdicts.style_right)}
    print(
        f"{named.description}: {len(wanted)} of {len(true)} true images through {arguments.model}"
    )
    print(psnr_words(psnr))
    for name, figure in figures.items():
        print(f"{name} right {figure.value:.1%} (95 %: {figure.low:.1%} to {figure.high:.1%})")
    if arguments.out is not None:
        result = Result(
            settings={
                "judge": named.description,
                "data": true.fingerprint,
                "image_size": true.pixels.shape[-1],
                "num_images": len(wanted),
                "wanted": hashlib.sha256(f"{wanted}".encode()).hexdigest(),
            },
            subject={"vae": arguments.model},
            figures={"PSNR of the VAE": psnr, **figures},
        )
        write_result(result, arguments.out)


def load_vae(model: str, device: torch.device) -> VAE:
    """The VAE of a model in float32, or one alone, such as `model/` of a train_vae.py run."""
    if Path(model).is_file():
        return load_pipeline(model, dtype="float32", device=device).vae
    return VAE.from_pretrained(find_component(model, "vae")).to(device)


def psnr_words(psnr: Figure) -> str:
    """A mean PSNR with its interval."""
    return f"PSNR {psnr.value:.2f} dB (95 %: {psnr.low:.2f} to {psnr.high:.2f})"
