"""DeepSpeed's ZeRO: stage 1 partitions AdamW's moments over the processes, stage 2 gradients too.

Rajbhandari et al. 2020, section 5. Every process has the full weights, in float32, and a partition
of each moment. accelerate's DeepSpeed plugin is not used: it serves one network per run and does
not engage on CPUs. Launcher, process group and autocast are accelerate's as for any other run.
"""

import os
from collections.abc import Mapping
from contextlib import nullcontext
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET = 2**24
"""Numbers that are reduced at a time; DeepSpeed's default would take 2 GB for them."""


class Zero:
    """DeepSpeed's engine around a network and its AdamW, both of which are stepped by it alone.

    `model` is the engine: a step calls it in place of the network.
    """

    def __init__(
        self,
        network: nn.Module,
        adamw: torch.optim.AdamW,
        *,
        stage: Literal[1, 2],
        max_grad_norm: float,
    ) -> None:
        """Raises ValueError where DeepSpeed is not installed. All processes must call it."""
        device = next(network.parameters()).device
        os.environ.setdefault("DS_ACCELERATOR", device.type)  # its own choice is a GPU if it can
        try:
            deepspeed: Any = import_module("deepspeed")
        except ImportError as error:
            raise ValueError(
                f"sharding='zero{stage}' needs DeepSpeed (pip install deepspeed); "
                "sharding='full' does not"
            ) from error
        self.network = network
        self._utils: Any = import_module("deepspeed.utils")
        self._adamw = adamw
        self._device = device
        self.model: Any = deepspeed.initialize(
            model=network,
            optimizer=adamw,
            config={
                "train_micro_batch_size_per_gpu": 1,  # not used, yet it must be there
                "gradient_clipping": max_grad_norm,
                "steps_per_print": None,
                "zero_allow_untested_optimizer": True,  # AdamW is not on its list, Adam is
                "zero_optimization": {"stage": stage, "reduce_bucket_size": BUCKET},
            },
        )[0]
        # accelerate's no_sync enters it, and DeepSpeed's own raises; `backward` has `last` instead.
        self.model.no_sync = nullcontext

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradients of one micro-batch's `loss` ().

        With the last micro-batch of a step the processes reduce theirs.
        """
        self.model.set_gradient_accumulation_boundary(last)
        self.model.backward(loss)

    def step(self) -> Tensor:
        """Average the processes' gradients, clip, step; returns the norm () before clipping.

        If the gradient is not finite the norm is infinite, and weights and moments stay as they
        are, in all processes alike.
        """
        self.model.step()
        return torch.as_tensor(
            self.model.get_global_grad_norm(), dtype=torch.float32, device=self._device
        )

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """AdamW's full state: name of the parameter -> key -> tensor; every process must call it.

        It is empty before the first step.
        """
        state = self._adamw.state.get(self._flat(), {})
        if not state:
            return {}
        return {
            name: {"step": state["step"].clone()}
            | {key: self._utils.safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
            for name, parameter in self.network.named_parameters()
        }

    def load(self, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over the network's weights as they are now, and what `moments` returned."""
        optimizer = self.model.optimizer
        optimizer.refresh_fp32_params()  # it steps on a copy of its partition
        if not moments:
            return
        flat = self._flat()
        step = next(iter(moments.values()))["step"]
        state = self._adamw.state[flat]
        state["step"] = step.to(flat.device, torch.float32, copy=True)
        for key in MOMENTS:
            if key not in state:
                state[key] = torch.zeros_like(flat)
        # It links parameters to their slices of the moments; without this, in its first step only.
        optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter in self.network.named_parameters():
            for key in MOMENTS:
                value = moments[name][key].to(flat.device)
                self._utils.safe_set_full_optimizer_state(parameter, value, key)

    def _flat(self) -> Tensor:
        """This process's partition, flattened: DeepSpeed has replaced the parameters with it."""
        ((flat,),) = (group["params"] for group in self._adamw.param_groups)
        return flat
