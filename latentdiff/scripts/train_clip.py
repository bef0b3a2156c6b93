"""Train a tokenizer and both CLIP towers: `python -m latentdiff.scripts.train_clip`."""

from latentdiff.training.help import show_help

if __name__ == "__main__":  # before the imports, which take seconds
    show_help("latentdiff.tasks.clip.config", "TrainCLIP")

from functools import partial
from itertools import islice

from transformers.utils import logging

from latentdiff.data.batches import check_batch
from latentdiff.data.caption_lengths import MAX_READ, cut_captions, some_captions
from latentdiff.data.dataset import CaptionedImages
from latentdiff.data.opening import open_images
from latentdiff.tasks.ahead import ahead
from latentdiff.tasks.clip.config import TrainCLIP
from latentdiff.tasks.clip.retrieval import validation_pool
from latentdiff.tasks.clip.task import CLIPTask
from latentdiff.tasks.images import hold_in_memory, image_batches
from latentdiff.training.command_line import parse_config, run_script
from latentdiff.training.loop import fit
from latentdiff.training.run import Run
from latentdiff.training.validation import val_indices


def main() -> None:
    """Run it with the options of the command line."""
    config, settings = parse_config(TrainCLIP)
    logging.disable_progress_bar()  # transformers' would break into ours
    run = Run(config, settings)
    processes, loop = run.processes, config.loop
    dataset = processes.main_first(lambda: open_images(config.data))
    pool, val, num_val = None, None, 0
    if isinstance(dataset, CaptionedImages):
        chosen = val_indices(len(dataset), config.val_fraction, seed=loop.seed)
        num_val = len(chosen) if len(chosen) > 1 else 0
        check_batch(loop.batch_size, len(dataset) - num_val)  # a stream tells when it ends
        if config.val_fraction > 0 and not num_val:
            fraction = f"val_fraction={config.val_fraction} of {len(dataset)} images"
            run.accelerator.print(
                f"retrieval is not measured, since {fraction} are fewer than two to hold out"
            )
        if num_val:
            val = chosen
            dataset.validation = frozenset(val.tolist())
            pool = processes.on_all(lambda: validation_pool(dataset, seed=loop.seed))
    elif config.val_fraction > 0:
        run.accelerator.print("retrieval is not measured, since a stream has no images to hold out")
    resident = hold_in_memory(dataset, run) if config.compute.in_memory else None
    table = None if resident is None else resident.captions
    task = CLIPTask(config, run, dataset=dataset, pool=pool, num_val=num_val, captions=table)
    if dataset.captions is None:
        captions = list(islice(dataset.some_captions(MAX_READ), MAX_READ))
    else:
        captions = some_captions(dataset.captions)
    if sentence := cut_captions(captions, task.tokenizer):
        run.accelerator.print(sentence)
    loader = partial(image_batches, dataset=dataset, resident=resident, run=run, val=val)
    fit(task, ahead(loader, task.prepare, run.device), run)


if __name__ == "__main__":
    run_script(main)
