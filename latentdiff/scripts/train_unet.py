"""Train the denoiser, a UNet or a DiT, on latents: `python -m latentdiff.scripts.train_unet`."""

from latentdiff.training.help import show_help

if __name__ == "__main__":  # before the imports, which take seconds
    show_help("latentdiff.tasks.denoiser.config", "TrainUNet")

import warnings
from functools import partial

from transformers.utils import logging

from latentdiff.data.batches import check_batch
from latentdiff.data.caption_lengths import cut_captions, some_captions
from latentdiff.tasks.ahead import ahead
from latentdiff.tasks.denoiser.class_images import join_class_images
from latentdiff.tasks.denoiser.config import TrainUNet
from latentdiff.tasks.denoiser.latents import latent_batches, open_cache, warn_of_small_sizes
from latentdiff.tasks.denoiser.start import (
    load_init,
    make_start,
    start_text_encoder,
    start_vae,
)
from latentdiff.tasks.denoiser.task import DenoiserTask
from latentdiff.training.by_heart import split_in_words
from latentdiff.training.command_line import parse_config, run_script
from latentdiff.training.loop import fit
from latentdiff.training.run import Run
from latentdiff.training.validation import val_indices


def main() -> None:
    """Run it with the options of the command line."""
    config, settings = parse_config(TrainUNet)
    logging.disable_progress_bar()  # transformers' would break into ours
    # Captions of training may be longer; nobody wants to read that of each of them.
    warnings.filterwarnings("ignore", "the prompt .* tokens and the text encoder reads")
    run = Run(config, settings)
    say = run.accelerator.print
    init = load_init(config, say)
    cache, vae = open_cache(config, run, lambda data: start_vae(config, init, data, say))
    val = val_indices(len(cache), config.val_fraction, seed=config.loop.seed)
    prior = join_class_images(config, run, init, cache=cache, val=val, vae=vae)
    if prior is None:  # beside class images a batch may have an image several times
        check_batch(config.loop.batch_size, len(cache) - len(val))
        if run.processes.rank == 0:
            warn_of_small_sizes(cache, val, config.loop.batch_size)
    captions = cache.captions if prior is None else prior.captions
    text_encoder = start_text_encoder(config, init, cache.data, say)
    if sentence := cut_captions(some_captions(captions), text_encoder.tokenizer):
        say(sentence)
    model = make_start(config, init, cache=cache, vae=vae, text_encoder=text_encoder, say=say)
    task = DenoiserTask(config, run, cache=cache, val=val, model=model, prior=prior)
    if sentence := split_in_words(
        len(val),
        len(cache),
        val_fraction=config.val_fraction,
        draws=task.draws,
        validate_every=config.loop.validate_every,
    ):
        say(sentence)
    loader = partial(latent_batches, cache=cache, val=val, config=config, run=run, prior=prior)
    fit(task, ahead(loader, task.prepare, run.device), run)
    if config.lora is not None:
        model = config.loop.output_dir / "model"
        say(f'draw with it: latentdiff generate --model {config.init} --lora {model} "a prompt"')


if __name__ == "__main__":
    run_script(main)
