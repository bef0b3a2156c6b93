"""Muon: the updates of a network's matrices are orthogonalised, and AdamW steps the rest.

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/), with the step size of Liu et al.
2025 ("Muon is scalable for LLM training", arXiv:2502.16982). A convolution's weight
(out, in, kh, kw) is the matrix (out, in·kh·kw).
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from latentdiff.training.blocks import gathered, local, local_rows

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic polynomial a x + b x³ + c x⁵: steep at 0, and near 1 from there on."""
STEPS = 5
WIDE = 2
"""Columns of a row from which iterating on (rows, rows) is faster."""
STACK = 2**22
"""Numbers that are orthogonalised at once, which bounds the memory that a step takes."""


def hidden_matrices(network: nn.Module) -> list[Tensor]:
    """The weights of the linear layers and convolutions in a network's numbered blocks.

    What is outside of them meets latents, images, tokens or times, and is not for Muon: the first
    and the last layer, the embeddings of time and text, a CLIP's projections. Frozen weights are
    left out. A network without numbered blocks, such as a discriminator, has no such matrices.
    """
    return [
        module.weight
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and any(part.isdigit() for part in name.split(".")[:-1])
        and module.weight.requires_grad
    ]


class Muon(torch.optim.Optimizer):
    """Steps `matrices` (rows, …), flattened from the second dimension on, and `others` by AdamW.

    The step of a matrix W with the orthogonalised update O, of rate lr, is

        W ← (1 - lr · weight_decay) W - lr · 0.2 √max(rows, columns) O,

    whose root mean square is about that of AdamW. The matrices are the first of the two groups.
    Where `found_inf` () is 1, weights and moments stay as they are, and the host does not wait for
    it. A matrix that is sharded by rows is gathered in every process, which all compute its step.
    """

    _step_supports_amp_scaling = True  # a GradScaler then sets `found_inf`
    found_inf: Tensor | None = None

    def __init__(
        self,
        matrices: Sequence[Tensor],
        others: Sequence[Tensor],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.bfloat16,
        fused: bool = True,
    ) -> None:
        """`dtype`: in which updates are orthogonalised; `fused`: AdamW's kernel."""
        super().__init__(
            [
                {"params": list(matrices), "muon": True},
                {"params": list(others), "muon": False},
            ],
            {
                **{"lr": lr, "betas": betas, "weight_decay": weight_decay, "momentum": momentum},
                **{"dtype": dtype, "fused": fused},
            },
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] # a GradScaler passes None
        """Step all parameters that have a gradient; there is no closure."""
        matrices, others = self.param_groups
        for stack in _stacks([p for p in matrices["params"] if p.grad is not None]):
            self._step_matrices(stack, matrices)
        self._step_adamw([p for p in others["params"] if p.grad is not None], others)

    def _step_matrices(self, stack: Sequence[Tensor], group: dict[str, Any]) -> None:
        """Step matrices of one shape or its transpose."""
        found_inf = self.found_inf
        if found_inf is None:
            found_inf = torch.zeros((), device=stack[0].device)
        finite, skip = 1 - found_inf, found_inf.bool()
        momentum, weights = group["momentum"], [local(p) for p in stack]
        for p in stack:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        moments = [local(self.state[p]["momentum_buffer"]) for p in stack]
        # 0 · nan would be nan below.
        updates = [local(p.grad).masked_fill(skip, 0.0) for p in stack if p.grad is not None]
        # Lists in place of loops: a step has a hundred matrices, and each call its price.
        share = ((1 - momentum) * finite).to(moments[0])
        torch._foreach_lerp_(moments, updates, [share] * len(stack))  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_lerp_(updates, moments, momentum)  # pyright: ignore[reportPrivateImportUsage] # Nesterov
        matrices = [
            gathered(update.to(group["dtype"]), p).flatten(1)
            for update, p in zip(updates, stack, strict=True)
        ]
        wide = [m.mT if len(m) > m.shape[1] else m for m in matrices]
        rows, columns = wide[0].shape
        orthogonal = orthogonalised(torch.stack(wide)).to(weights[0].dtype)
        step = -group["lr"] * 0.2 * max(rows, columns) ** 0.5 * finite
        decay = 1 - group["lr"] * group["weight_decay"] * finite
        changes = [
            local_rows((one.mT if len(p) > rows else one).reshape(p.shape), p)
            for one, p in zip((orthogonal * step).unbind(), stack, strict=True)
        ]
        torch._foreach_mul_(weights, decay.to(weights[0]))  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(weights, changes)  # pyright: ignore[reportPrivateImportUsage]

    def _step_adamw(self, parameters: Sequence[Tensor], group: dict[str, Any]) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        moments = {
            key: [self.state[p][key] for p in parameters]
            for key in ("exp_avg", "exp_avg_sq", "step")
        }
        adamw(
            list(parameters),
            [p.grad for p in parameters if p.grad is not None],
            moments["exp_avg"],
            moments["exp_avg_sq"],
            [],
            moments["step"],
            fused=group["fused"],
            found_inf=self.found_inf,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=1e-8,
            maximize=False,
        )


def orthogonalised(matrices: Tensor) -> Tensor:
    """U V^T of each matrix U S V^T, roughly: (n, rows, columns) of rows <= columns -> the same.

    Newton-Schulz iterations in the matrices' type. Singular values come out between about 0.7 and
    1.2, but for those that are tiny beside the others.
    """
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    if matrices.shape[2] < WIDE * matrices.shape[1]:
        a, b, c = COEFFICIENTS
        for _ in range(STEPS):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x
    # In bfloat16 more than three in a row would blow rounding errors up.
    return _iterated(_iterated(x, 2), STEPS - 2)


def _iterated(x: Tensor, steps: int) -> Tensor:
    """The same iterations by products of (rows, rows) alone, but for the first and the last.

    An iteration is x <- M x with a polynomial M of G = x x^T, so that G <- M G M.
    """
    a, b, c = COEFFICIENTS
    gram = x @ x.mT
    product = torch.eye(len(gram[0]), dtype=x.dtype, device=x.device).expand_as(gram)
    for left in reversed(range(steps)):
        rest = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # M = a I + rest
        product = torch.baddbmm(product, rest, product, beta=a)
        if left:
            gram = torch.baddbmm(gram, rest, gram, beta=a)
            gram = torch.baddbmm(gram, gram, rest, beta=a)
    return product @ x


def _stacks(matrices: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The matrices in lists of one shape or its transpose, whose small products are faster at once.

    A list has `STACK` numbers at most, or a single matrix.
    """

    def shape(p: Tensor) -> list[int]:
        return sorted((len(p), p.numel() // len(p)))

    for (rows, columns), same in groupby(sorted(matrices, key=shape), key=shape):
        alike = list(same)
        size = max(1, STACK // (rows * columns))
        yield from (alike[i : i + size] for i in range(0, len(alike), size))
