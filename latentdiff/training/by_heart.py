"""Says when a network begins to learn its training images by heart: the held-out ones get worse.

Each held-out example has the same noises and times at each validation, so that it is compared with
itself at the step of the least loss. The errors of all validations are kept in the run folder: a
resumed run knows them, and says what the run without a break would have said.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from latentdiff.training.logging.log import Log
from latentdiff.training.validation import VAL_ERRORS

ERRORS_FILE = f"{VAL_ERRORS}.jsonl"
LEAST_EXAMPLES = 3
"""Held-out examples below which their spread says nothing, and so nothing is said."""
STANDARD_ERRORS = 2.0
"""How many standard errors the loss must rise by. The least of several losses is partly least by
chance: with one, a network that has stopped learning would be accused of more."""
LEAST_RISE = 0.01
"""And by which share of itself: steps jolt the weights, and so the losses of all examples at once,
which their spread does not show."""


class HeldOutErrors:
    """The mean loss of each held-out example at each validation of a run, and what they mean."""

    def __init__(self, path: Path, start: int) -> None:
        """Open the file of a run that goes on from step `start`; later lines are cut off."""
        self._log = Log(path, start)
        self._best: dict[str, Any] | None = None
        self._said = False  # of the rise above this best one
        for line in path.read_text(encoding="utf-8").splitlines():
            self._judge(json.loads(line))

    @property
    def best_step(self) -> int | None:
        """The step of the least mean loss so far."""
        return None if self._best is None else self._best["step"]

    def add(self, step: int, errors: Tensor) -> str:
        """Note the losses of n examples with d draws each, (n, d), after a step.

        Returns a sentence when their mean has risen above the least one by more than chance, once
        until there is a new least one; else "".
        """
        means = errors.double().mean(dim=1).tolist()
        record = {"step": step, "draws": errors.shape[1], "errors": means}
        self._log.write(record)
        return self._judge(record)

    def _judge(self, record: dict[str, Any]) -> str:
        errors = np.array(record["errors"])
        best, loss = self._best, float(errors.mean())
        if not np.isfinite(loss):
            return ""
        # Another number of draws has other noises: nothing can be paired with those before.
        if best is None or best["draws"] != record["draws"] or loss < np.mean(best["errors"]):
            self._best, self._said = record, False
            return ""
        if self._said or not has_risen(np.array(best["errors"]), errors):
            return ""
        self._said = True
        least, step = float(np.mean(best["errors"])), best["step"]
        return (
            f"step {record['step']}: the validation loss has risen from {least:.4g} (step {step}) "
            f"to {loss:.4g}: the network begins to learn the training images by heart; the model "
            f"of step {step} was better with others; --save_best true keeps it, and a run with "
            f"--max_steps {step}, more images or a lower learning_rate helps"
        )


def has_risen(before: np.ndarray, after: np.ndarray) -> bool:
    """Whether the mean loss of the same n examples, (n,) each, has risen by more than chance.

    By STANDARD_ERRORS of the mean of the paired differences, and by LEAST_RISE of the mean; never
    of fewer than LEAST_EXAMPLES.
    """
    n = len(before)
    if n < LEAST_EXAMPLES:
        return False
    risen = after - before
    chance = STANDARD_ERRORS * risen.std(ddof=1) / np.sqrt(n)
    return bool(risen.mean() > max(chance, LEAST_RISE * before.mean()))


def split_in_words(
    num_val: int, num_samples: int, *, val_fraction: float, draws: int, validate_every: int
) -> str:
    """What a validation split of `num_val` of `num_samples` images can tell; "" if it is usual."""
    if val_fraction == 0:
        return ""
    wanted = [count for count in (1, LEAST_EXAMPLES) if num_val < count < num_samples]
    advice = " or ".join(
        f"--val_fraction {fraction_for(count, num_samples)} for {count}" for count in wanted
    )
    if num_val == 0:
        sentence = f"no validation: val_fraction={val_fraction} of {num_samples} images is not one"
        return sentence + (f"; {advice}" if advice else "")
    if draws == 1 and not wanted:
        return ""
    sentence = (
        f"validation every {validate_every} steps: {num_val} of {num_samples} images, each with "
        f"{draws} noises"
    )
    if wanted:
        sentence += (
            f"; to say whether the network learns by heart needs {LEAST_EXAMPLES} of them: {advice}"
        )
    return sentence


def fraction_for(count: int, num_samples: int) -> float:
    """The least short val_fraction that holds out `count` of `num_samples` examples."""
    digits = len(str(num_samples))
    fraction = round(count / num_samples, digits)
    while int(fraction * num_samples) < count:
        fraction = round(fraction + 10**-digits, digits)
    return fraction
