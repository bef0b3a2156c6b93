"""Train the autoencoder on images alone: `python -m latentdiff.scripts.train_vae`."""

from latentdiff.training.help import show_help

if __name__ == "__main__":  # before the imports, which take seconds
    show_help("latentdiff.tasks.vae.config", "TrainVAE")

from functools import partial

from latentdiff.data.batches import check_batch
from latentdiff.data.opening import open_images
from latentdiff.tasks.ahead import ahead
from latentdiff.tasks.images import hold_in_memory, image_batches
from latentdiff.tasks.vae.config import TrainVAE
from latentdiff.tasks.vae.perceptual import Perceptual
from latentdiff.tasks.vae.task import VAETask
from latentdiff.training.command_line import parse_config, run_script
from latentdiff.training.loop import fit
from latentdiff.training.run import Run


def main() -> None:
    """Run it with the options of the command line."""
    config, settings = parse_config(TrainVAE)
    run = Run(config, settings)
    weights, loop = config.loss.perceptual_weights, config.loop
    perceptual = None
    if config.loss.perceptual_weight > 0 and weights is not None:
        perceptual = Perceptual(weights, image_size=config.data.image_size)
    dataset = run.processes.main_first(lambda: open_images(config.data))
    if dataset.num_samples is not None:  # a stream tells when its first epoch ends
        check_batch(loop.batch_size, dataset.num_samples)
    task = VAETask(config, run, dataset=dataset, perceptual=perceptual)
    resident = hold_in_memory(dataset, run) if config.compute.in_memory else None
    loader = partial(image_batches, dataset=dataset, resident=resident, run=run)
    fit(task, ahead(loader, task.prepare, run.device), run)


if __name__ == "__main__":
    run_script(main)
