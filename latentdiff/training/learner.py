"""Learner: a network with its optimizer, its learning rate and the averages of its weights."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from latentdiff.models.precision import computes_bf16
from latentdiff.training.accelerator import ComputeConfig, Sharding
from latentdiff.training.adamw8bit import from_tensors, make_adamw8bit, to_tensors
from latentdiff.training.blocks import (
    as_dtensor,
    checkpoint_activations,
    compile_blocks,
    compile_network,
    gathered,
    local,
    local_rows,
    shard,
)
from latentdiff.training.deepspeed import Zero
from latentdiff.training.ema import EMAConfig, WeightAverages
from latentdiff.training.muon import Muon, hidden_matrices
from latentdiff.training.optimizer import OptimizerConfig, check_sharding
from latentdiff.training.randomness import MicroBatch


class Learner:
    """`model` is the bare network, `forward_model` what a step calls, `ema` the saved average.

    `forward_model` runs `model` in autocast and, in several processes, averages their gradients.
    Parameters whose `requires_grad` is false from the start are frozen: they keep their bits, `ema`
    has them in common with `model`, and no checkpoint holds them.
    With sharding "full", `ema` is the full average, which is up to date only after `gather`.
    """

    def __init__(
        self,
        model: nn.Module,
        accelerator: Accelerator,
        *,
        optimizer: OptimizerConfig,
        max_steps: int,
        ema: EMAConfig | None = None,
        compute: ComputeConfig | None = None,
        sharding: Sharding = "none",
    ) -> None:
        """Without `ema` no average is tracked, and the attribute `ema` is the network itself.

        Raises ValueError for a network or an optimizer that cannot be sharded so.
        """
        check_sharding(optimizer.optimizer, sharding)
        self.config, self.max_steps = optimizer, max_steps
        self.accelerator = accelerator
        if accelerator.num_processes == 1:
            sharding = "none"
        model = model.to(accelerator.device)
        way = False if compute is None or compute.compile == "auto" else compute.compile
        if way and sharding == "none" and optimizer.optimizer != "adamw8bit":
            # FSDP2 refuses it, bitsandbytes undoes it in its first step, and norms that are not
            # compiled are slower in it. torch's overloads leave it out.
            model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.model = model
        frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.ema = model
        if ema is not None:
            self.ema = copy.deepcopy(model, frozen).requires_grad_(False).eval()
        if compute is not None and compute.gradient_checkpointing:
            checkpoint_activations(model)
        if way in ("network", "graph"):
            compile_network(model, graph=way == "graph")
        elif way is True:
            compile_blocks(model)
        if sharding != "none" and accelerator.scaler is not None:
            raise ValueError(
                f"mixed_precision='fp16' must be 'bf16' or 'no' with sharding={sharding!r}"
            )
        self.sharded = sharding == "full"
        if self.sharded:
            shard(model, accelerator.device.type, accelerator.num_processes)
        parameters = dict(model.named_parameters())
        self.trained = {name: parameters[name] for name in names}
        """The parameters that are not frozen, by name."""
        self.num_updates = 0
        self.skipped = torch.zeros((), device=accelerator.device)
        """1 if the last update was skipped, else 0; a tensor, so that the host need not wait."""
        self.skipped_in_a_row = torch.zeros((), device=accelerator.device)
        self._make_optimizer(sharding)
        self._averages = None if ema is None else WeightAverages(ema, self._local_ema())

    def _make_optimizer(self, sharding: Sharding) -> None:
        # Only fused kernels take `found_inf`, and so skip an update without the host waiting.
        self._eight_bits = self.config.optimizer == "adamw8bit"
        self._fused = self.accelerator.device.type in ("cuda", "cpu") and not self._eight_bits
        self._bare_optimizer = self._muon() if self.config.optimizer == "muon" else self._adamw()
        # evaluation_mode: a sharded model is wrapped in autocast, but not in DDP.
        self.forward_model: Any = self.accelerator.prepare_model(
            self.model, evaluation_mode=sharding != "none"
        )
        self.optimizer = self.accelerator.prepare_optimizer(self._bare_optimizer)
        self._zero = None
        if sharding in ("zero1", "zero2"):
            assert isinstance(self._bare_optimizer, torch.optim.AdamW)
            self._zero = Zero(
                self.model,
                self._bare_optimizer,
                stage=1 if sharding == "zero1" else 2,
                max_grad_norm=self.config.max_grad_norm,
            )
            self.forward_model = self._zero.model

    def _adamw(self) -> torch.optim.Optimizer:
        parameters: list[Any] = list(self.trained.values())
        options: dict[str, Any] = {
            "lr": self.config.learning_rate,
            "betas": (0.9, self.config.beta2),
            "weight_decay": self.config.weight_decay,
        }
        if self._eight_bits:
            return make_adamw8bit(parameters, **options)
        return torch.optim.AdamW(parameters, fused=self._fused, **options)

    def _muon(self) -> Muon:
        matrices = hidden_matrices(self.model)
        chosen = set(matrices)
        return Muon(
            matrices,
            [p for p in self.trained.values() if p not in chosen],
            lr=self.config.learning_rate,
            betas=(0.9, self.config.beta2),
            weight_decay=self.config.weight_decay,
            dtype=torch.bfloat16 if computes_bf16(self.accelerator.device) else torch.float32,
            fused=self._fused,
        )

    def _local_ema(self) -> list[Tensor]:
        """This process's rows of the average's parameters, in the order of `trained`."""
        ema = [p.data for p in self._full_ema().values()]
        if not self.sharded:
            return ema
        return [
            local_rows(p, like).clone() for p, like in zip(ema, self.trained.values(), strict=True)
        ]

    def _full_ema(self) -> dict[str, Tensor]:
        """The average's parameters that are not frozen, by name."""
        parameters = dict(self.ema.named_parameters())
        return {name: parameters[name] for name in self.trained}

    @property
    def learning_rate(self) -> float:
        """AdamW's learning rate of the last update."""
        return self.config.learning_rate_at(self.num_updates - 1, max_steps=self.max_steps)

    def update(self, loss: Tensor, micro_batch: MicroBatch | None = None) -> Tensor:
        """Take an optimizer step for `loss` (); returns the norm () of the unclipped gradient.

        With gradient accumulation, `loss` is the mean over one micro-batch: the step is taken with
        a process's last one, and 0 is returned for those before it.
        A step whose gradient is not finite is counted but skipped: weights, `ema` and moments stay
        as they are, in all processes alike, since they all have the same gradient.
        """
        micro_batch = micro_batch or MicroBatch(0, self.accelerator.num_processes)
        count = micro_batch.count // self.accelerator.num_processes
        last = (micro_batch.index + 1) % count == 0
        if self._zero is None:
            self.accelerator.backward(loss / count)
        else:
            self._zero.backward(loss / count, last=last)
        if not last:
            return torch.zeros((), device=loss.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate_at(
                self.num_updates, max_steps=self.max_steps, muon=group.get("muon", False)
            )
        grad_norm = self._step() if self._zero is None else self._zero.step()
        finite = grad_norm.isfinite()
        self.num_updates += 1
        self.skipped = (~finite).float()
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * self.skipped
        if self._averages is not None:
            weights = [local(p) for p in self.trained.values()]
            self._averages.update(weights, num_updates=self.num_updates, finite=finite)
        return grad_norm

    def _step(self) -> Tensor:
        """Clip the gradient and, if it is finite, step; returns the norm () before clipping."""
        # accelerate's wrappers look for a package on disk in every step; only a scaler needs them.
        scaled = self.accelerator.scaler is not None
        if scaled:
            self.accelerator.unscale_gradients(self.optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(
            self.trained.values(), self.config.max_grad_norm
        ).detach()
        if isinstance(grad_norm, DTensor):
            grad_norm = grad_norm.full_tensor()
        finite = grad_norm.isfinite()
        if scaled:  # the scaler skips what is not finite
            self.optimizer.step()
        elif self._fused:
            self._bare_optimizer.found_inf = (~finite).float()  # pyright: ignore[reportAttributeAccessIssue]
            self._bare_optimizer.step()
        elif bool(finite):
            self._bare_optimizer.step()
        self._bare_optimizer.zero_grad(set_to_none=True)
        return grad_norm

    def _trainable(self) -> list[str]:
        """Names of the trained parameters, in the optimizer's order."""
        names = {p: name for name, p in self.trained.items()}
        groups = self._bare_optimizer.param_groups
        return [names[p] for group in groups for p in group["params"]]

    def gather(self) -> None:
        """All-gather `ema` if the network is sharded; every process must call it."""
        if self.sharded and self._averages is not None:
            rows = zip(self._averages.tensors["ema"], self.trained.values(), strict=True)
            for full, (average, like) in zip(self._full_ema().values(), rows, strict=True):
                full.data.copy_(gathered(average, like))

    def snapshots(self) -> dict[str, dict[str, Tensor]]:
        """The full power-function averages: length, as "0.05" -> parameter -> tensor.

        Every process must call it, and the main process alone gets them.
        """
        snapshots: dict[str, dict[str, Tensor]] = {}
        for key, average in self._named_averages().items():
            if key == "ema":
                continue
            tensors: dict[str, Tensor] = {}
            pairs = zip(self.trained.items(), average, strict=True)
            for (name, like), rows in pairs:
                full = gathered(rows, like)
                if self.accelerator.is_main_process:
                    tensors[name] = full
            snapshots[key.removeprefix("ema-")] = tensors
        return snapshots

    def _named_averages(self) -> Mapping[str, list[Tensor]]:
        return {} if self._averages is None else self._averages.tensors

    def tensors(self) -> dict[str, Tensor]:
        """All that resuming needs, by name: weights, averages, moments, the loss scale.

        Of a sharded network each process returns its local rows, and the main process alone
        returns what is not sharded. Every process must call it.
        """
        state = dict(self._state())
        if self._zero is None:
            moments = {name: self.optimizer.state[self.trained[name]] for name in self._trainable()}
        else:
            moments = self._zero.moments()
        if self._eight_bits:
            moments = {name: to_tensors(values) for name, values in moments.items()}
        for name, values in moments.items():
            state |= {f"optimizer.{name}.{key}": value for key, value in values.items()}
        if self.accelerator.scaler is not None:  # fp16, whose loss scale is found by trial
            scaler = self.accelerator.scaler.state_dict()
            state["scaler.scale"] = torch.tensor(scaler["scale"], dtype=torch.float64)
            state["scaler.growth"] = torch.tensor(scaler["_growth_tracker"])
        if self.sharded and not self.accelerator.is_main_process:
            state = {name: tensor for name, tensor in state.items() if isinstance(tensor, DTensor)}
        for prefix, average in self._named_averages().items():
            rows = zip(self.trained, average, strict=True)
            state |= {f"{prefix}.{name}": tensor for name, tensor in rows}
        return {name: local(tensor) for name, tensor in state.items()}

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        """The trained parameters and the buffers, by their names in a checkpoint."""
        frozen = dict(self.model.named_parameters()).keys() - self.trained.keys()
        for name, tensor in self.model.state_dict().items():
            if name not in frozen:
                yield f"model.{name}", tensor

    def load_tensors(self, state: Mapping[str, Tensor], *, num_updates: int) -> None:
        """Restore, bit for bit, what `tensors` returned after so many updates; `state` has it in
        full, whatever number of processes it was sharded over.

        `gather` then brings `ema` up to date. Raises ValueError for tensors of another network.
        """
        # Each with the tensor that it is sharded like.
        current = {name: (tensor, tensor) for name, tensor in self._state()}
        for prefix, average in self._named_averages().items():
            for (name, like), rows in zip(self.trained.items(), average, strict=True):
                current[f"{prefix}.{name}"] = (rows, like)
        saved = {name for name in state if not name.startswith(("optimizer.", "scaler."))}
        for name in (*current, *sorted(saved - current.keys())):
            in_state = tuple(state[name].shape) if name in saved else "absent"
            in_network = tuple(current[name][1].shape) if name in current else "absent"
            if in_state != in_network:
                raise ValueError(
                    f"{name} is {in_state} in the checkpoint, {in_network} in the network"
                )
        for name, (tensor, like) in current.items():
            local(tensor).copy_(local_rows(state[name], like))
        moments: dict[str, dict[str, Tensor]] = {}
        for saved_name in state:
            if saved_name.startswith("optimizer."):
                name, _, key = saved_name.removeprefix("optimizer.").rpartition(".")
                value, like = state[saved_name], self.trained[name]
                if key != "step" and value.shape == like.shape:
                    # In the weight's memory format, which fused kernels take for granted.
                    empty = torch.empty_like(local(like), dtype=value.dtype)
                    value = empty.copy_(local_rows(value, like))
                    value = as_dtensor(value, like) if isinstance(like, DTensor) else value
                moments.setdefault(name, {})[key] = value
        if self._eight_bits:
            moments = {name: from_tensors(values) for name, values in moments.items()}
        if self._zero is None:
            # The optimizer knows which device each of them belongs on.
            trainable = enumerate(self._trainable())
            numbered = {i: moments[name] for i, name in trainable if name in moments}
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
