"""Learner: a network with its optimizer, learning rate and exponential moving average (EMA)."""

import copy
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from latentdiff.training.randomness import Share


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) with warm-up and cool-down, and the EMA of the weights."""

    learning_rate: float = 1e-4
    max_steps: int = 1000
    """Optimizer steps of the whole run."""
    warmup_steps: int = 100
    """Steps in which the learning rate climbs from 0."""
    cooldown_steps: int = 0
    """Last steps of the run, in which the learning rate falls to 0 in a straight line."""
    beta2: float = 0.99
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm when it is longer."""
    ema_decay: float = 0.999
    """Half-life of about 0.69 / (1 - ema_decay) steps; less at the start of a run."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if self.max_steps < 1:
            raise ValueError(f"max_steps={self.max_steps} must be at least 1")
        for name in ("warmup_steps", "cooldown_steps", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        for name in ("beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1)")

    def learning_rate_at(self, step: int) -> float:
        """The rate of update number `step`, counted from 0; a function of the step alone."""
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        cooldown = min(1.0, (self.max_steps - step) / max(1, self.cooldown_steps))
        return self.learning_rate * warmup * cooldown


class Learner:
    """`model` is what a step calls, wrapped if there are several processes; `ema` what is kept."""

    def __init__(self, model: nn.Module, config: OptimizerConfig, accelerator: Accelerator) -> None:
        self.config = config
        self.accelerator = accelerator
        model = model.to(accelerator.device)
        self.ema = copy.deepcopy(model).requires_grad_(False).eval()
        # Only fused kernels take `found_inf`, and so leave out an update without the host waiting.
        self._fused = accelerator.device.type in ("cuda", "cpu")
        self._adamw = torch.optim.AdamW(
            model.parameters(),
            lr=config.learning_rate,
            betas=(0.9, config.beta2),
            weight_decay=config.weight_decay,
            fused=self._fused,
        )
        self.raw = model
        self.model, self.optimizer = accelerator.prepare(model, self._adamw)
        self.num_updates = 0
        self.skipped = torch.zeros((), device=accelerator.device)
        """1 if the last update was left out, else 0; a tensor, so that nobody waits for it."""
        self.skipped_in_a_row = torch.zeros((), device=accelerator.device)

    def update(self, loss: Tensor, share: Share | None = None) -> Tensor:
        """One step down the gradient of `loss` (); returns the gradient's norm (), unclipped.

        With gradient accumulation, `loss` is the mean over one part, `share`, of the global batch:
        the step is taken with a process's last part, and 0 returned for those before it.
        A step whose gradient is not finite is counted but leaves weights, average and moments as
        they are, in all processes alike, since they all have the same gradient.
        """
        parts = 1 if share is None else share.count // self.accelerator.num_processes
        self.accelerator.backward(loss / parts)
        if share is not None and (share.index + 1) % parts:
            return torch.zeros((), device=loss.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate_at(self.num_updates)
        grad_norm = self.accelerator.clip_grad_norm_(
            self.model.parameters(), self.config.max_grad_norm
        )
        assert grad_norm is not None
        finite = grad_norm.isfinite()
        if self.accelerator.scaler is None and self._fused:
            self._adamw.found_inf = (~finite).float()  # pyright: ignore[reportAttributeAccessIssue]
            self.optimizer.step()
        elif self.accelerator.scaler is not None or bool(finite):  # a scaler looks for itself
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.num_updates += 1
        self.skipped = (~finite).float()
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * self.skipped
        # The early average forgets its random start; 10 as in the common TensorFlow recipe.
        decay = min(self.config.ema_decay, (1 + self.num_updates) / (10 + self.num_updates))
        averages = [p.data for p in self.ema.parameters()]
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage] # EMAs everywhere use it
            averages,
            [p.data for p in self.raw.parameters()],
            [(1.0 - decay) * finite.to(averages[0])] * len(averages),
        )
        return grad_norm

    def tensors(self) -> dict[str, Tensor]:
        """Everything that resuming needs, by name: weights, EMA, both moments of AdamW, scale."""
        state = {f"model.{name}": tensor for name, tensor in self.raw.state_dict().items()}
        state |= {f"ema.{name}": tensor for name, tensor in self.ema.state_dict().items()}
        for name, parameter in self.raw.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                state[f"optimizer.{name}.{key}"] = value
        if self.accelerator.scaler is not None:  # of fp16: the scale is found by trial
            scaler = self.accelerator.scaler.state_dict()
            state["scaler.scale"] = torch.tensor(scaler["scale"], dtype=torch.float64)
            state["scaler.growth"] = torch.tensor(scaler["_growth_tracker"])
        return state

    def load_tensors(self, state: dict[str, Tensor], *, num_updates: int) -> None:
        """Go on from what `tensors` gave after `num_updates` updates, bit for bit.

        Raises ValueError when that was of another network.
        """
        for prefix, network in (("model.", self.raw), ("ema.", self.ema)):
            own = {prefix + name: tensor for name, tensor in network.state_dict().items()}
            kept = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
            for name in own | kept:
                was, now = (tuple(d[name].shape) if name in d else "absent" for d in (kept, own))
                if was != now:
                    raise ValueError(f"{name} is {was} in the checkpoint, {now} in the network")
            network.load_state_dict({name.removeprefix(prefix): kept[name] for name in own})
        names = [name for name, _ in self.raw.named_parameters()]
        moments = {
            i: {key: state[f"optimizer.{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            for i, name in enumerate(names)
            if f"optimizer.{name}.step" in state
        }
        # The optimizer knows which device each of them belongs on.
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.num_updates = num_updates
        if self.accelerator.scaler is not None and "scaler.scale" in state:
            scale, growth = float(state["scaler.scale"]), int(state["scaler.growth"])
            scaler = self.accelerator.scaler
            scaler.load_state_dict(
                {**scaler.state_dict(), "scale": scale, "_growth_tracker": growth}
            )
