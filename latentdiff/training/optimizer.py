"""OptimizerConfig: the optimizer and its learning rate, a function of the step alone."""

from dataclasses import dataclass
from typing import Literal, get_args

from latentdiff.options import option

Optimizer = Literal["adamw", "adamw8bit", "muon"]


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, or Muon, with a warm-up and a cooldown of the learning rate."""

    optimizer: Optimizer = "adamw"
    """adamw: Loshchilov & Hutter 2019. adamw8bit: the same with moments of eight bits, which take a
    quarter of the memory (Dettmers et al. 2021), by bitsandbytes, which must be installed. muon:
    the updates of the matrices in the network's blocks, convolutions among them, are orthogonalised
    (Jordan et al. 2024); AdamW steps the rest."""
    learning_rate: float = 1e-4
    """Of AdamW."""
    muon_learning_rate: float = option(6e-3, needs="optimizer=muon")
    """Of the matrices, with the same warm-up and cooldown; optimizer muon alone has it."""
    warmup_steps: int = 100
    """Steps in which the learning rate climbs from 0."""
    cooldown_steps: int = option(0, may_change=True)
    """Last steps of the run, in which the learning rate falls to 0 in a straight line."""
    beta2: float = 0.99
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm when it is longer."""

    def __post_init__(self) -> None:
        if self.optimizer not in get_args(Optimizer):
            allowed = ", ".join(get_args(Optimizer))
            raise ValueError(f"optimizer={self.optimizer!r} must be one of {allowed}")
        for name in ("learning_rate", "muon_learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        for name in ("warmup_steps", "cooldown_steps", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if not 0 <= self.beta2 < 1:
            raise ValueError(f"beta2={self.beta2} must be in [0, 1)")

    def shortfall(self, max_steps: int) -> str | None:
        """In words, how much of the learning rate a run of `max_steps` never gets to; else None."""
        if self.warmup_steps + self.cooldown_steps <= max_steps:
            return None
        rates = (self.learning_rate_at(i, max_steps=max_steps) for i in range(max_steps))
        return (
            f"warmup_steps={self.warmup_steps} and cooldown_steps={self.cooldown_steps} are longer "
            f"than max_steps={max_steps}: the learning rate gets to "
            f"{100 * max(rates) / self.learning_rate:.2g} % of learning_rate={self.learning_rate}; "
            "lower them, or raise max_steps"
        )

    def learning_rate_at(self, step: int, *, max_steps: int, muon: bool = False) -> float:
        """The rate of update number `step`, counted from 0, in a run of `max_steps`.

        `muon`: that of the matrices, else AdamW's.
        """
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        cooldown = min(1.0, (max_steps - step) / max(1, self.cooldown_steps))
        peak = self.muon_learning_rate if muon else self.learning_rate
        return peak * warmup * cooldown


def check_sharding(optimizer: Optimizer, sharding: str) -> None:
    """Raise ValueError for an optimizer whose network cannot be sharded so."""
    reason = None
    if optimizer == "muon" and sharding in ("zero1", "zero2"):
        reason = "DeepSpeed flattens the matrices; sharding='full' does not"
    elif optimizer == "adamw8bit" and sharding != "none":
        reason = "bitsandbytes steps whole parameters"
    if reason is not None:
        raise ValueError(
            f"optimizer={optimizer!r} must be 'adamw' with sharding={sharding!r}: {reason}"
        )
