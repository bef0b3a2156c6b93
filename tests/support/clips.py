"""Whole CLIPs of random weights, in folders as transformers writes them."""

from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
)

from support.tiny import TOKENS, tiny_tokenizer

SIDE = 16
MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]  # near OpenAI's


@torch.no_grad()
def tiny_clip(folder: Path, *, seed: int = 0, scaled: bool = True) -> CLIPModel:
    """Write towers, tokenizer and image processor into a folder; without `scaled`, as ours is."""
    tokenizer = tiny_tokenizer(folder)
    tokenizer.save_pretrained(folder)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        projection_dim=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_act="gelu",
    )
    image = CLIPVisionConfig(
        hidden_size=12,
        intermediate_size=20,
        projection_dim=8,
        num_hidden_layers=1,
        num_attention_heads=3,
        image_size=SIDE,
        patch_size=4,
        hidden_act="gelu",
    )
    torch.manual_seed(seed)
    model = CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=image.to_dict(), projection_dim=8)
    ).eval()
    for parameter in model.parameters():  # norms, biases and embeddings of trained ones too
        parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    side = {"height": SIDE, "width": SIDE}
    mean, std = (MEAN, STD) if scaled else ([0.5] * 3, [0.5] * 3)
    CLIPImageProcessor(size=side, crop_size=side, image_mean=mean, image_std=std).save_pretrained(
        folder
    )
    return model
