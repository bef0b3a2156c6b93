"""What an option of drawing or loading is called in diffusers and A1111's API, and is here."""

import difflib
from collections.abc import Collection, Iterable

NO = "which there is no counterpart of here: "
DRAWING = {
    "batch_size": "num_images",
    "n_iter": "num_images",
    "latents": "seed or generator, from which the first noise follows",
    "eta": 'sampler="ddim" for eta=0, or "ddpm" for eta=1',
    "timesteps": "steps and level_spacing",
    "sigmas": "steps and level_spacing",
    "scheduler": "sampler",
    "sampler_name": "sampler",
    "sampler_index": "sampler",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "denoising_strength": "strength",
    "init_image": "image",
    "init_images": "image",
    "mask": "mask_image",
    "prompt_embeds": f"prompt, {NO}prompts are texts",
    "negative_prompt_embeds": f"negative_prompt, {NO}prompts are texts",
    "cross_attention_kwargs": 'pipe.loras.load("style.safetensors", scale=0.8) before',
    "clip_skip": "nothing: the text encoder's configuration says which layer is read",
    "callback": "callback_on_step_end",
    "callback_steps": "callback_on_step_end, which is called after each step",
    "return_dict": "nothing: the output always has .images and .seeds",
}
LOADING = {
    "scheduler": "sampler when you draw",
    "safety_checker": "nothing: there is none",
    "requires_safety_checker": "nothing: there is none",
    "use_safetensors": "nothing: nothing else is read",
    "local_files_only": "nothing, and set HF_HUB_OFFLINE=1",
    "cache_dir": "nothing, and set HF_HUB_CACHE",
    "device_map": 'device, such as "cuda"',
}


def refuse_unknown(given: Iterable[str], known: Collection[str], *, loading: bool = False) -> None:
    """Raise TypeError for a name that is not `known`, saying which of ours does what it does."""
    elsewhere = LOADING if loading else DRAWING
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            ours = elsewhere.get(name) or next(iter(near), None)
            advice = f"give {ours}" if ours else f"known are {', '.join(known)}"
            raise TypeError(f"there is no option {name!r}; {advice}")
