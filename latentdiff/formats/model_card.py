"""What model cards have in common: front matter for the Hugging Face Hub, and how to use a model.

https://huggingface.co/docs/hub/model-cards says what the fields mean.
"""

import re
from pathlib import Path

PREVIEW = "preview.png"
_TAG = "text-to-image"
_LIBRARY = {"clip": "transformers"}
_TAGS = {
    "pipeline": ["latent-diffusion"],
    "student": ["latent-diffusion", "progressive-distillation"],
    "lora": ["latent-diffusion", "lora"],
    "student_lora": ["latent-diffusion", "lora", "progressive-distillation"],
    "clip": ["clip"],
    "vae": ["autoencoder"],
}
_USAGE = {
    "pipeline": """```python
from latentdiff import Pipeline

Pipeline.from_pretrained("THIS FOLDER")("a prompt", seed=0).images[0]
```

or `latentdiff generate "a prompt" --model "THIS FOLDER"`. If it has a `unet/`, the folder is
a plain diffusers pipeline too: `diffusers.DiffusionPipeline.from_pretrained("THIS FOLDER")`.
""",
    "lora": """```
latentdiff generate "a prompt" --model BASE --lora "THIS FOLDER"
```

In diffusers: `pipeline.load_lora_weights("THIS FOLDER")`.
""",
    "student_lora": """```
latentdiff generate "a prompt" --model BASE --lora "THIS FOLDER"
```

draws in the student's steps, without guidance, which is in it. In diffusers, load it with
`pipeline.load_lora_weights("THIS FOLDER")` and draw with DDIM in the same steps (trailing spacing)
and `guidance_scale=1`; of a flow DDIM is DPM-Solver++ of first order.
""",
    "clip": """`accelerate launch -m latentdiff.scripts.train_unet --text_encoder "THIS FOLDER"`
trains beside its text tower; \
`transformers.CLIPModel.from_pretrained("THIS FOLDER", subfolder="clip")` has both towers.
""",
    "vae": """`accelerate launch -m latentdiff.scripts.cache_latents --vae "THIS FOLDER"` makes
latents of images, and `train_unet` in its place trains on them;
`diffusers.AutoencoderKL.from_pretrained("THIS FOLDER")` reads it, unless its encoder is
`downsample`.
""",
}


def front_matter(kind: str, *, license: str = "unknown", base_model: str | None = None) -> str:
    """The YAML head of a card of a model of a kind: see `usage`."""
    lines = [f"license: {license}", f"library_name: {_LIBRARY.get(kind, 'diffusers')}"]
    if kind not in ("clip", "vae"):
        lines.append(f"pipeline_tag: {_TAG}")
    if base_model is not None and "/" in base_model:  # the hub knows no embedded model
        lines.append(f"base_model: {base_model}")
    lines.append(f"tags: [{', '.join(['latentdiff', *_TAGS[kind]])}]")
    return "---\n" + "".join(f"{line}\n" for line in lines) + "---\n"


def usage(kind: str, base: str | None = None) -> str:
    """How a "pipeline", "student", "lora", "student_lora", "clip" or "vae" is used.

    `base` is what a LoRA is for, or the name of another kind.
    """
    text = _USAGE["pipeline" if kind == "student" else kind]
    name = "BASE" if kind.endswith("lora") else "THIS FOLDER"
    return text if base is None else text.replace(name, base)


def public_name(name: str | None) -> str | None:
    """A hub id or the name of something built in, such as "emoji"; None for a path, which is
    nobody's business."""
    if name is None or Path(name).exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return None
    return name if not name.startswith(".") else None
