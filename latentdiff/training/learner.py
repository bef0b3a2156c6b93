"""Learner: a network with its optimizer, learning rate and exponential moving average (EMA)."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from latentdiff.training.blocks import (
    compile_blocks,
    joined,
    local,
    own_rows,
    recompute,
    shard,
    split,
)
from latentdiff.training.deepspeed import Zero
from latentdiff.training.ema import power_decay, power_exponent
from latentdiff.training.randomness import Share


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) with warm-up and cool-down, averages of the weights, and
    how a network's passes are run."""

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
    ema_lengths: Sequence[float] = ()
    """Power-function averages that are tracked as well, by their relative standard deviation, such
    as 0.05 and 0.1: from their snapshots `latentdiff ema` makes the average of any length."""
    gradient_checkpointing: bool = False
    """Compute each block's activations again in the backward pass in place of keeping them."""
    compile: bool = False
    """Compile the blocks of the network (torch.compile): minutes at the start, faster steps."""
    sharding: Literal["none", "full", "zero1", "zero2"] = "none"
    """What the processes share: full splits weights, gradients, moments and averages over them
    (FSDP2); zero1 the moments alone and zero2 the gradients too, with DeepSpeed."""

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
        for length in self.ema_lengths:
            power_exponent(length)
        if len(set(self.ema_lengths)) < len(self.ema_lengths):
            raise ValueError(f"ema_lengths={list(self.ema_lengths)} must differ from each other")

    def learning_rate_at(self, step: int) -> float:
        """The rate of update number `step`, counted from 0; a function of the step alone."""
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        cooldown = min(1.0, (self.max_steps - step) / max(1, self.cooldown_steps))
        return self.learning_rate * warmup * cooldown


class Learner:
    """`model` is what a step calls, `raw` the network in it, `ema` its average, which is kept.

    Parameters that need no gradient when it is made are frozen: kept as they are, bit for bit.
    Where the processes share one network (`sharding`), `ema` is whole and up to date only after
    `gather`.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimizerConfig,
        accelerator: Accelerator,
        *,
        averaged: bool = True,
    ) -> None:
        """Without `averaged` there is no average, and `ema` is the network itself.

        Raises ValueError for a network that cannot be sharded.
        """
        self.config = config
        self.accelerator = accelerator
        model = model.to(accelerator.device)
        self.ema = copy.deepcopy(model).requires_grad_(False).eval() if averaged else model
        if config.gradient_checkpointing:
            recompute(model)
        if config.compile:
            compile_blocks(model)
        sharding = config.sharding if accelerator.num_processes > 1 else "none"
        if sharding != "none" and accelerator.scaler is not None:
            raise ValueError(
                f"mixed_precision='fp16' must be 'bf16' or 'no' with sharding={sharding!r}"
            )
        self.sharded = sharding == "full"
        if self.sharded:
            shard(model, accelerator.device.type, accelerator.num_processes)
        # Only fused kernels take `found_inf`, and so leave out an update without the host waiting.
        self._fused = accelerator.device.type in ("cuda", "cpu")
        self._adamw = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad],
            lr=config.learning_rate,
            betas=(0.9, config.beta2),
            weight_decay=config.weight_decay,
            fused=self._fused,
        )
        self.raw = model
        # Of accelerate, what is sharded gets autocast alone, and not DDP.
        self.model: Any = accelerator.prepare_model(model, evaluation_mode=sharding != "none")
        self.optimizer = accelerator.prepare_optimizer(self._adamw)
        self._zero = None
        if sharding in ("zero1", "zero2"):
            self._zero = Zero(
                model,
                self._adamw,
                stage=1 if sharding == "zero1" else 2,
                max_grad_norm=config.max_grad_norm,
            )
            self.model = self._zero.model
        self.num_updates = 0
        self.skipped = torch.zeros((), device=accelerator.device)
        """1 if the last update was left out, else 0; a tensor, so that nobody waits for it."""
        self.skipped_in_a_row = torch.zeros((), device=accelerator.device)
        averages = [p.data for p in self.ema.parameters()]
        if self.sharded:
            likes = zip(averages, model.parameters(), strict=True)
            averages = [own_rows(average, like).clone() for average, like in likes]
        self._averages = {"ema": averages} if averaged else {}
        """By name, what this process has of each average, in the order of the parameters."""
        lengths = config.ema_lengths if averaged else ()
        self._exponents = {str(float(x)): power_exponent(x) for x in lengths}
        for name in self._exponents:
            self._averages[f"ema-{name}"] = [average.clone() for average in averages]

    def update(self, loss: Tensor, share: Share | None = None) -> Tensor:
        """One step down the gradient of `loss` (); returns the gradient's norm (), unclipped.

        With gradient accumulation, `loss` is the mean over one part, `share`, of the global batch:
        the step is taken with a process's last part, and 0 returned for those before it.
        A step whose gradient is not finite is counted but leaves weights, `ema` and moments as they
        are, in all processes alike, since they all have the same gradient.
        """
        parts = 1 if share is None else share.count // self.accelerator.num_processes
        last = share is None or (share.index + 1) % parts == 0
        if self._zero is None:
            self.accelerator.backward(loss / parts)
        else:
            self._zero.backward(loss / parts, last=last)
        if not last:
            return torch.zeros((), device=loss.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate_at(self.num_updates)
        grad_norm = self._step() if self._zero is None else self._zero.step()
        finite = grad_norm.isfinite()
        self.num_updates += 1
        self.skipped = (~finite).float()
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * self.skipped
        weights = [local(p) for p in self.raw.parameters()]
        for name, average in self._averages.items():
            step: Any = 1.0 - self._decay(name)
            if name == "ema":  # the others' closed form counts every update
                step = [step * finite.to(average[0])] * len(average)
            torch._foreach_lerp_(average, weights, step)  # pyright: ignore[reportPrivateImportUsage]
        return grad_norm

    def _step(self) -> Tensor:
        """Clip the gradient and step, if it is finite; its norm (), unclipped."""
        # accelerate's own wrappers look for a package on disk in every step; a scaler needs them.
        scaled = self.accelerator.scaler is not None
        if scaled:
            self.accelerator.unscale_gradients(self.optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(
            self.raw.parameters(), self.config.max_grad_norm
        ).detach()
        if isinstance(grad_norm, DTensor):
            grad_norm = grad_norm.full_tensor()
        finite = grad_norm.isfinite()
        if scaled:  # it looks for itself
            self.optimizer.step()
        elif self._fused:
            self._adamw.found_inf = (~finite).float()  # pyright: ignore[reportAttributeAccessIssue]
            self._adamw.step()
        elif bool(finite):
            self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        return grad_norm

    def _trained(self) -> list[str]:
        """Names of the parameters that the optimizer has, in its order; the others are frozen."""
        return [name for name, p in self.raw.named_parameters() if p.requires_grad]

    def _decay(self, average: str) -> float:
        """What the last update leaves of an average."""
        if average == "ema":
            # The early average forgets its random start; 10 as in the common TensorFlow recipe.
            early = (1 + self.num_updates) / (10 + self.num_updates)
            return min(self.config.ema_decay, early)
        return power_decay(self.num_updates, self._exponents[average.removeprefix("ema-")])

    def gather(self) -> None:
        """Bring `ema` up to date, in every process; all must call it."""
        if self.sharded and self._averages:
            shards = zip(self._averages["ema"], self.raw.parameters(), strict=True)
            for whole, (average, like) in zip(self.ema.parameters(), shards, strict=True):
                whole.data.copy_(joined(average, like))

    def snapshots(self) -> dict[str, dict[str, Tensor]]:
        """The power-function averages, whole: length, as "0.05" -> parameter -> tensor.

        Every process must call it, and the first alone gets them.
        """
        found: dict[str, dict[str, Tensor]] = {}
        for name in self._exponents:
            found[name] = {}
            pairs = zip(self.raw.named_parameters(), self._averages[f"ema-{name}"], strict=True)
            for (path, like), average in pairs:
                whole = joined(average, like)
                if self.accelerator.is_main_process:
                    found[name][path] = whole
        return found

    def tensors(self) -> dict[str, Tensor]:
        """Everything that resuming needs, by name: weights, averages, both moments of AdamW, scale.

        Of what is split over the processes, this one's rows; of the rest, if others have it too,
        all of it in the first process and nothing in the others. Every process must call it.
        """
        named = dict(self.raw.named_parameters())
        state = {f"model.{name}": tensor for name, tensor in self.raw.state_dict().items()}
        if self._zero is None:
            moments = {name: self.optimizer.state[named[name]] for name in self._trained()}
        else:
            moments = self._zero.moments()
        for name, kept in moments.items():
            state |= {f"optimizer.{name}.{key}": value for key, value in kept.items()}
        if self.accelerator.scaler is not None:  # of fp16: the scale is found by trial
            scaler = self.accelerator.scaler.state_dict()
            state["scaler.scale"] = torch.tensor(scaler["scale"], dtype=torch.float64)
            state["scaler.growth"] = torch.tensor(scaler["_growth_tracker"])
        if self.sharded and not self.accelerator.is_main_process:
            state = {name: tensor for name, tensor in state.items() if isinstance(tensor, DTensor)}
        for prefix, average in self._averages.items():
            state |= {f"{prefix}.{name}": part for name, part in zip(named, average, strict=True)}
        return {name: local(tensor) for name, tensor in state.items()}

    def load_tensors(self, state: Mapping[str, Tensor], *, num_updates: int) -> None:
        """Go on, bit for bit, from the whole tensors that `tensors` gave after so many updates.

        `gather` then brings `ema` up to date.

        They may have been split over any number of processes. Raises ValueError when they were of
        another network.
        """
        named = dict(self.raw.named_parameters())
        own = {f"model.{name}": (t, t) for name, t in self.raw.state_dict().items()}
        for prefix, average in self._averages.items():
            for (name, like), part in zip(named.items(), average, strict=True):
                own[f"{prefix}.{name}"] = (part, like)
        kept = {name for name in state if not name.startswith(("optimizer.", "scaler."))}
        for name in (*own, *sorted(kept - own.keys())):
            was = tuple(state[name].shape) if name in kept else "absent"
            now = tuple(own[name][1].shape) if name in own else "absent"
            if was != now:
                raise ValueError(f"{name} is {was} in the checkpoint, {now} in the network")
        for name, (part, like) in own.items():
            local(part).copy_(own_rows(state[name], like))
        moments: dict[str, dict[str, Tensor]] = {}
        for name, like in named.items():
            if f"optimizer.{name}.step" in state:
                moments[name] = {"step": state[f"optimizer.{name}.step"]}
                for key in ("exp_avg", "exp_avg_sq"):
                    rows = own_rows(state[f"optimizer.{name}.{key}"], like).clone()
                    moments[name][key] = split(rows, like) if isinstance(like, DTensor) else rows
        if self._zero is None:
            # The optimizer knows which device each of them belongs on.
            trained = enumerate(self._trained())
            numbered = {i: moments[name] for i, name in trained if name in moments}
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": numbered, "param_groups": groups})
        else:
            self._zero.load(moments)
        self.num_updates = num_updates
        if self.accelerator.scaler is not None and "scaler.scale" in state:
            scale, growth = float(state["scaler.scale"]), int(state["scaler.growth"])
            scaler = self.accelerator.scaler
            scaler.load_state_dict(
                {**scaler.state_dict(), "scale": scale, "_growth_tracker": growth}
            )
