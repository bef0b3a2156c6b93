"""OptimizerConfig: AdamW and its learning rate, a function of the step alone."""

from dataclasses import dataclass

from latentdiff.options import option


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) with a warm-up and a cooldown of the learning rate."""

    learning_rate: float = 1e-4
    warmup_steps: int = 100
    """Steps in which the learning rate climbs from 0."""
    cooldown_steps: int = option(0, may_change=True)
    """Last steps of the run, in which the learning rate falls to 0 in a straight line."""
    beta2: float = 0.99
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm when it is longer."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        for name in ("warmup_steps", "cooldown_steps", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if not 0 <= self.beta2 < 1:
            raise ValueError(f"beta2={self.beta2} must be in [0, 1)")

    def learning_rate_at(self, step: int, *, max_steps: int) -> float:
        """The rate of update number `step`, counted from 0, in a run of `max_steps`."""
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        cooldown = min(1.0, (max_steps - step) / max(1, self.cooldown_steps))
        return self.learning_rate * warmup * cooldown
