"""Distil a model into a student of few steps: `python -m latentdiff.scripts.distill`."""

from latentdiff.training.help import show_help

if __name__ == "__main__":  # before the imports, which take seconds
    show_help("latentdiff.tasks.distill.config", "Distill")

import warnings
from functools import partial

from transformers.utils import logging

from latentdiff.data.batches import check_batch
from latentdiff.data.caption_lengths import cut_captions, some_captions
from latentdiff.tasks.ahead import ahead
from latentdiff.tasks.denoiser.latents import latent_batches, open_cache, warn_of_small_sizes
from latentdiff.tasks.denoiser.start import make_start
from latentdiff.tasks.distill.config import Distill
from latentdiff.tasks.distill.start import load_teacher
from latentdiff.tasks.distill.task import DistillTask
from latentdiff.training.by_heart import split_in_words
from latentdiff.training.command_line import parse_config, run_script
from latentdiff.training.loop import fit
from latentdiff.training.run import Run
from latentdiff.training.validation import val_indices


def main() -> None:
    """Run it with the options of the command line."""
    config, settings = parse_config(Distill)
    logging.disable_progress_bar()  # transformers' would break into ours
    # Captions of training may be longer; nobody wants to read that of each of them.
    warnings.filterwarnings("ignore", "the prompt .* tokens and the text encoder reads")
    run = Run(config, settings)
    say, denoiser = run.accelerator.print, config.denoiser()
    teacher = load_teacher(config, say)
    cache, vae = open_cache(denoiser, run, lambda data: (teacher.vae, None))
    val = val_indices(len(cache), config.val_fraction, seed=config.loop.seed)
    check_batch(config.loop.batch_size, len(cache) - len(val))
    if run.processes.rank == 0:
        warn_of_small_sizes(cache, val, config.loop.batch_size)
    text_encoder = teacher.text_encoder
    if sentence := cut_captions(some_captions(cache.captions), text_encoder.tokenizer):
        say(sentence)
    teacher = make_start(
        denoiser, teacher, cache=cache, vae=vae, text_encoder=text_encoder, say=say
    )
    task = DistillTask(config, run, cache=cache, val=val, teacher=teacher)
    if sentence := split_in_words(
        len(val),
        len(cache),
        val_fraction=config.val_fraction,
        draws=task.draws,
        validate_every=config.loop.validate_every,
    ):
        say(sentence)
    loader = partial(latent_batches, cache=cache, val=val, config=denoiser, run=run)
    fit(task, ahead(loader, task.prepare, run.device), run)


if __name__ == "__main__":
    run_script(main)
