"""DeepSpeed's ZeRO stages 1 and 2: moments, in stage 2 gradients too, split over the processes.

Rajbhandari et al. 2020, section 5. Every process has whole weights, in float32, and a part of each
moment. Of accelerate's DeepSpeed plugin nothing is used: it serves one network a run and does not
engage on CPUs; launcher, process group and autocast are accelerate's as ever.
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
"""Numbers that are sent at a time; DeepSpeed's default would take 2 GB for them."""


class Zero:
    """`model` is what a step calls, in place of the network; its AdamW steps through here alone."""

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
        # What accelerate's no_sync enters, and DeepSpeed refuses: `backward` knows the last part.
        self.model.no_sync = nullcontext

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of one part of this process's share of the batch, `loss` ().

        With the last part the processes put theirs together.
        """
        self.model.set_gradient_accumulation_boundary(last)
        self.model.backward(loss)

    def step(self) -> Tensor:
        """Clip, and step with the mean of all processes' gradients; returns its norm (), unclipped.

        The norm is infinite if the gradient was not finite; then weights and moments stay as they
        are, in all processes alike.
        """
        self.model.step()
        return torch.as_tensor(
            self.model.get_global_grad_norm(), dtype=torch.float32, device=self._device
        )

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """AdamW's state, whole: name of the parameter -> key -> tensor; every process must call it.

        Empty before the first step.
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
        """Go on from the network's weights as they are now and from what `moments` gave."""
        optimizer = self.model.optimizer
        optimizer.refresh_fp32_params()  # it steps on a copy of its part of the weights
        if not moments:
            return
        flat = self._flat()
        step = next(iter(moments.values()))["step"]
        state = self._adamw.state[flat]
        state["step"] = step.to(flat.device, torch.float32, copy=True)
        for key in MOMENTS:
            if key not in state:
                state[key] = torch.zeros_like(flat)
        # Else it does so in its first step: parameters learn where their parts of a moment are.
        optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter in self.network.named_parameters():
            for key in MOMENTS:
                value = moments[name][key].to(flat.device)
                self._utils.safe_set_full_optimizer_state(parameter, value, key)

    def _flat(self) -> Tensor:
        """All that this process steps on, in one row: DeepSpeed has put it in place of the rest."""
        ((flat,),) = (group["params"] for group in self._adamw.param_groups)
        return flat
