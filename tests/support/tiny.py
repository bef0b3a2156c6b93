"""A whole pipeline of random weights, small enough to draw with in a test."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from latentdiff.diffusion import Diffusion
from latentdiff.models.clip_text import CLIPText
from latentdiff.models.text import TextEncoder
from latentdiff.models.unet import UNet, UNetConfig
from latentdiff.models.vae import VAE, VAEConfig
from latentdiff.pipeline import Pipeline
from latentdiff.request import Request

CONTEXT_DIM = 16
TOKENS = 12
UNET = UNetConfig(
    sample_size=8,
    block_out_channels=(16, 32),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    cross_attention_dim=CONTEXT_DIM,
    attention_head_dim=2,
    norm_num_groups=8,
)

ONE_WIDTH = replace(
    UNET,
    block_out_channels=(16, 16),
    down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
)
"""With fewer sizes of layers, of each of which torch's compiler makes C++ that takes seconds."""


def tiny_tokenizer(folder: Path, *, length: int = TOKENS) -> CLIPTokenizer:
    """CLIP's byte pairs without a single merge: a token a byte, so that every text has tokens."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = json.dumps({word: i for i, word in enumerate(words)})
    (folder / "vocab.json").write_text(vocabulary, encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=length)


def tiny_text_encoder(folder: Path) -> TextEncoder:
    tokenizer = tiny_tokenizer(folder)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CONTEXT_DIM,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=8,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return TextEncoder(CLIPText(config), tokenizer)


def transformers_tower(encoder: TextEncoder) -> CLIPTextModel:
    """transformers' tower with the weights of ours, whose names begin with `text_model.` or not."""
    theirs = CLIPTextModel(encoder.model.config)
    ours = encoder.model.state_dict()
    names = theirs.state_dict().keys()
    theirs.load_state_dict({name: ours[name.removeprefix("text_model.")] for name in names})
    return theirs.eval()


def tiny_pipeline(
    folder: Path, diffusion: Diffusion | None = None, *, seed: int = 0, inpaints: bool = False
) -> Pipeline:
    """Random weights in every layer; `folder` is scratch space for the tokenizer's files."""
    torch.manual_seed(seed)
    learned = diffusion is not None and diffusion.learned_variance
    channels = {"in_channels": 9 if inpaints else 4, "out_channels": 8 if learned else 4}
    unet = UNet(replace(UNET, **channels))
    vae = VAE(
        VAEConfig(
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=16,
            scaling_factor=0.5,
        )
    )
    for network in (unet, vae):
        randomise(network)
    return Pipeline(
        unet=unet.eval(),
        vae=vae.eval(),
        text_encoder=tiny_text_encoder(folder),
        diffusion=Diffusion("flow", "flow_prediction") if diffusion is None else diffusion,
    )


def double_pipeline(folder: Path) -> Pipeline:
    """In float64, so that the factors of DoRA are in float64 too."""
    pipeline = tiny_pipeline(folder, Diffusion("scaled_linear", "epsilon"))
    for network in (pipeline.unet, pipeline.text_encoder.model):
        network.double()
    return pipeline


@torch.no_grad()
def randomise(network: torch.nn.Module) -> None:
    """Fill the layers that start at zero: a network that outputs zeros hides every error."""
    for parameter in network.parameters():
        if not parameter.any():
            parameter.normal_(std=0.1)


class Recording(Pipeline):
    """Keeps the latents that it decodes, which images have rounded away."""

    latents: Tensor

    def _decoded(self, latents: Tensor, request: Request | None) -> Tensor:
        self.latents = latents
        return super()._decoded(latents, request)
