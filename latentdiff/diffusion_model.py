"""A text-to-image model: three networks and a diffusion process, loaded, moved, converted, saved.

`pipeline.py` draws with it; what the files of a model hold is in loading.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Never, Self

import torch

from latentdiff import loading
from latentdiff.device import Target, default_device, targets
from latentdiff.diffusion import Diffusion
from latentdiff.engines.choice import check_engine
from latentdiff.engines.compiled import Compiled
from latentdiff.engines.openvino import OpenVINO
from latentdiff.formats.option_names import refuse_unknown
from latentdiff.loading import Components
from latentdiff.models.dit import DiT
from latentdiff.models.lora import LoRAs
from latentdiff.models.precision import Precision, one_dtype
from latentdiff.models.text import TextEncoder
from latentdiff.models.unet import UNet
from latentdiff.models.vae import VAE

COMMON = ("dtype", "torch_dtype", "device", "engine")  # what every way of loading takes


class DiffusionModel:
    """A text encoder, a denoiser, a VAE and a diffusion process, and what computes them."""

    def __init__(
        self, *, unet: UNet | DiT, vae: VAE, text_encoder: TextEncoder, diffusion: Diffusion
    ) -> None:
        loading.check_shapes(unet, vae, text_encoder, diffusion)
        self.unet = unet
        """The denoising network. It may be a DiT; "the UNet" here is either."""
        self.vae = vae
        self.text_encoder = text_encoder
        self.loras = LoRAs(unet, text_encoder.model, diffusion)
        """LoRAs on the UNet and the text encoder: `pipe.loras.load("style.safetensors")`."""
        self.compiled: Compiled | None = None
        """What computes the networks as torch compiled them, once `compile` was called."""
        self.openvino: OpenVINO | None = None
        """What computes the networks in torch's place, if they were loaded for it."""

    def to(self, device: Target | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move the three networks to a device, convert them to a dtype, or both, in place.

        `to("cuda")`, `to(torch.float16)` and `to("cuda", torch.float16)` are as torch's. Raises
        ValueError for weights that are too large for the dtype, and for what OpenVINO does not
        compute in or on; nothing has changed then.
        """
        asked = targets(device, dtype)
        if self.openvino is not None:
            for target in asked:
                self.openvino.check_target(target)
        loading.move((self.unet, self.vae, self.text_encoder), asked)
        return self

    @property
    def device(self) -> torch.device:
        """The device of the UNet."""
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the UNet."""
        return next(self.unet.parameters()).dtype

    @property
    def engine(self) -> str:
        """What computes the networks: "torch" or "openvino"."""
        return "torch" if self.openvino is None else "openvino"

    @property
    def precision(self) -> torch.dtype:
        """The dtype that the UNet is computed in: `dtype`, or OpenVINO's."""
        return self.dtype if self.openvino is None else self.openvino.dtype

    @property
    def diffusion(self) -> Diffusion:
        """The diffusion process; with a student's LoRA the student's."""
        return self.loras.diffusion

    @property
    def inpaints(self) -> bool:
        """Whether the UNet sees the mask and the masked image beside the noisy latents."""
        return self.unet.config.in_channels != self.vae.config.latent_channels

    @property
    def side(self) -> int:
        """The side in pixels of the images that it was trained on, and draws by default."""
        trained, config = self.unet.config.sample_size, self.vae.config
        return config.sample_size if trained is None else trained * config.factor

    @property
    def components(self) -> Components:
        """The networks and the diffusion process, in the order of `loading.Components`."""
        return Components(self.unet, self.vae, self.text_encoder, self.diffusion)

    def fingerprint(self) -> str:
        """SHA-256 of the three networks and the noise schedule: the same in any precision."""
        return loading.components_fingerprint(self.components)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        variant: str | None = None,
        dtype: Precision = torch.float32,
        torch_dtype: Precision = None,
        device: str | torch.device | None = None,
        engine: str = "torch",
        **unknown: Never,
    ) -> Self:
        """Load "emoji" (embedded), a diffusers folder, a single file, or from the Hugging Face Hub.

        For a single .safetensors file of A1111's and ComfyUI's kind `from_single_file` has more
        options. `revision` is the branch, tag or commit of a hub id; `variant`, such as "fp16",
        chooses among a folder's weights. Weights of any precision become `dtype` (`torch_dtype` is
        diffusers' name), which with "auto" is bfloat16 where the device computes in it and float32
        elsewhere, or stay as they are with None. The default device is the accelerator, or else the
        CPU. `engine` "openvino" computes there in torch's place (docs/generate.md). Raises
        ValueError if there is no such model, or not all of it, and for an option that is not its.
        """
        refuse_unknown(unknown, ("revision", "variant", *COMMON), loading=True)
        if not str(name) or not isinstance(name, str | Path):
            raise ValueError(f'model={name!r} must be a name or a path, such as "emoji"')
        dtype, device = one_dtype(dtype, torch_dtype), default_device(device, engine)
        if Path(name).is_file():
            loading.check_single_file(name, revision=revision, variant=variant)
            return cls.from_single_file(name, dtype=dtype, device=device, engine=engine)
        weights, computed = check_engine(engine, dtype=dtype, device=device)
        components = loading.load_folder(name, revision=revision, variant=variant, dtype=weights)
        return cls(**components._asdict())._on(device, computed, name)

    @classmethod
    def from_single_file(
        cls,
        path: str | Path,
        *,
        config: str | Path | None = None,
        tokenizer: str | Path | None = None,
        ema: bool = False,
        dtype: Precision = torch.float32,
        torch_dtype: Precision = None,
        device: str | torch.device | None = None,
        engine: str = "torch",
        **unknown: Never,
    ) -> Self:
        """Load one .safetensors file with LDM's names, as A1111 and ComfyUI use them.

        `config` (an LDM YAML file or a diffusers folder) describes what the tensors do not show.
        Without it the file's latentdiff metadata does, or a YAML file of the same name beside it,
        or the conventions of SD 1.x and 2.x, with a warning where these are ambiguous. `tokenizer`
        is a folder or hub id; the default is the one in the file, or CLIP's own. `ema`
        loads the running averages that some files hold as well. `dtype`, `device` and `engine` are
        those of `from_pretrained`. Raises ValueError for any other file, saying what it seems to
        be.
        """
        refuse_unknown(unknown, ("config", "tokenizer", "ema", *COMMON), loading=True)
        dtype, device = one_dtype(dtype, torch_dtype), default_device(device, engine)
        weights, computed = check_engine(engine, dtype=dtype, device=device)
        components = loading.load_single_file(
            path, config=config, tokenizer=tokenizer, ema=ema, dtype=weights
        )
        return cls(**components._asdict())._on(device, computed, path)

    def _on(
        self, device: str | torch.device, computed: torch.dtype | None, model: str | Path
    ) -> Self:
        """Go to a device, or to OpenVINO if that computes in a dtype; the model is at `model`."""
        if computed is not None:
            networks = (self.unet, self.vae, self.text_encoder)
            self.openvino = OpenVINO(*networks, self.loras, dtype=computed, model=model)
        return self.to(device)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write a plain diffusers pipeline folder; `dtype` is what weights are converted to.

        A DiT is in `transformer/`, and such a folder is for latentdiff alone. model_index.json
        comes last: a folder that has one is complete. Raises ValueError, before anything is
        written, for weights that are not finite or too large for `dtype`.
        """
        loading.save_folder(self.components, folder, dtype=dtype)

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face Hub; returns its address.

        Raises ValueError, saying why, where the hub cannot be reached or refuses.
        """
        return loading.push(self.components, repo_id, private=private, token=token)

    def save_single_file(
        self,
        path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> list[str]:
        """Write one .safetensors file with LDM's names; returns sentences on which tools open it.

        Where tools cannot infer the model, its LDM config (.yaml) is written beside it. `metadata`
        is what the header shall say besides, such as author and licence. Raises ValueError, before
        anything is written, for weights that are not finite or too large for `dtype`.
        """
        return loading.save_single_file(self.components, path, dtype=dtype, metadata=metadata)
