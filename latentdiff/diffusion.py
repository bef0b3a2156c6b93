"""The diffusion process: noise schedules, forward process, posterior, prediction types and loss.

Nothing here knows a network or a sampler. Papers: DDPM (Ho et al. 2020, arXiv:2006.11239) for the
beta schedules, rectified flow (Liu et al. 2022, arXiv:2209.03003) for `flow`. Everywhere
x_t = alpha x0 + sigma eps with eps ~ N(0, I); t = 0 is data and t = T is (nearly) pure noise.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor

from latentdiff.formats import scheduler

Schedule = Literal["linear", "scaled_linear", "cosine", "flow"]
Prediction = Literal["epsilon", "sample", "v_prediction", "score", "flow_prediction"]
Spacing = Literal["leading", "trailing", "linspace"]
Grid = Literal["ddim", "ddpm", "euler", "dpm"]

# What is left of the picture's variance at t = T. Stable Diffusion's own schedule leaves 0.0047.
LARGEST_FINAL_ALPHA_BAR = 0.01

_BETA_RANGES = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}


class NoiseLevel(NamedTuple):
    """A noise level, x_t = alpha x0 + sigma eps, and what the network is told of it; () or (B,)."""

    timestep: Tensor
    alpha: Tensor
    sigma: Tensor


Denoise = Callable[[Tensor, NoiseLevel], Tensor]  # x_t (B, C, H, W), level -> estimate of x0
Network = Callable[[Tensor, Tensor, Tensor], Tensor]  # x_t (B, C, H, W), timestep (B,), context


@dataclass(frozen=True, eq=False)
class NoiseLevels:
    """The N + 1 noise levels of a sampling run of N steps, noisiest first; the last is data.

    `timestep`, `alpha` and `sigma` are (N + 1,). `len` is the number of steps N, and an index from
    0 to N gives one level.
    """

    timestep: Tensor
    alpha: Tensor
    sigma: Tensor

    def __len__(self) -> int:
        """The number of steps."""
        return len(self.sigma) - 1

    def __getitem__(self, i: int) -> NoiseLevel:
        """Level i, of scalars."""
        return NoiseLevel(self.timestep[i], self.alpha[i], self.sigma[i])


@dataclass(frozen=True)
class Diffusion:
    """A noise schedule and what the network predicts: all that a trained denoiser depends on.

    t is the papers': whole numbers 0 … T for the beta schedules, real numbers in [0, T] for `flow`
    (sigma = t / T, alpha = 1 - t / T). `beta_start` and `beta_end` belong to `linear` (by default
    1e-4 … 0.02) and `scaled_linear` (0.00085 … 0.012). `timestep_spacing`, `steps_offset` and
    `set_alpha_to_one` choose the levels of a sampling run, with the meanings that they have in
    diffusers; the defaults start at t = T and end on data (Lin et al. 2023, arXiv:2305.08891).
    Everything is computed in float64; results have the dtype and device of x.

    Raises ValueError for a value out of range, and for `epsilon` or `score` with `flow`: at t = T
    there alpha is 0, and neither says anything about x0. Warns if the end of the chain is not
    near N(0, I): if alpha_bar_T exceeds 0.01.
    """

    schedule: Schedule
    prediction: Prediction
    num_timesteps: int = 1000
    beta_start: float | None = None
    beta_end: float | None = None
    timestep_spacing: Spacing = "trailing"
    steps_offset: int = 1
    set_alpha_to_one: bool = True

    def __post_init__(self) -> None:
        """Check the fields and fill in the schedule's own betas."""
        _check_choice("schedule", self.schedule, get_args(Schedule))
        _check_choice("prediction", self.prediction, get_args(Prediction))
        _check_choice("timestep_spacing", self.timestep_spacing, get_args(Spacing))
        if self.num_timesteps < 2:
            raise ValueError(f"num_timesteps={self.num_timesteps} must be at least 2")
        if self.steps_offset < 0:
            raise ValueError(f"steps_offset={self.steps_offset} must not be negative")
        if self.schedule == "flow":
            if self.prediction in ("epsilon", "score"):
                raise ValueError(
                    f"prediction={self.prediction} cannot be used with schedule=flow, where alpha "
                    "is 0 at t=T: choose flow_prediction, v_prediction or sample"
                )
            if not self.set_alpha_to_one:
                raise ValueError("set_alpha_to_one=False is for beta schedules, not schedule=flow")
        self._fill_betas()
        # Cached tensors made in inference mode could not be trained with later.
        with torch.inference_mode(False):
            left = 0.0 if self.schedule == "flow" else float(self.alphas_cumprod[-1])
        if left > LARGEST_FINAL_ALPHA_BAR:
            warnings.warn(
                f"the end of the noise chain is not near N(0, I): alpha_bar_T = {left:.3g} > "
                f"{LARGEST_FINAL_ALPHA_BAR}; raise num_timesteps or beta_end",
                stacklevel=3,
            )

    def _fill_betas(self) -> None:
        if self.schedule not in _BETA_RANGES:
            if self.beta_start is not None or self.beta_end is not None:
                raise ValueError(f"schedule={self.schedule} has no beta_start or beta_end")
            return
        start, end = _BETA_RANGES[self.schedule]
        start = start if self.beta_start is None else self.beta_start
        end = end if self.beta_end is None else self.beta_end
        if not 0 < start <= end < 1:
            raise ValueError(
                f"beta_start={start} and beta_end={end} must satisfy 0 < start <= end < 1"
            )
        object.__setattr__(self, "beta_start", start)  # the dataclass is frozen
        object.__setattr__(self, "beta_end", end)

    # Buffers of the beta schedules, (T,) float64, t = 1 first: index t - 1 belongs to t.

    @cached_property
    def betas(self) -> Tensor:
        """beta_t: the variance of the noise that step t adds; ValueError for `flow`."""
        n = self.num_timesteps
        if self.schedule == "cosine":
            return torch.tensor(_cosine_betas(n), dtype=torch.float64, device="cpu")
        if self.beta_start is None or self.beta_end is None:
            raise ValueError("schedule=flow has no betas")
        power = 0.5 if self.schedule == "scaled_linear" else 1.0
        start, end = self.beta_start**power, self.beta_end**power
        return torch.linspace(start, end, n, dtype=torch.float64, device="cpu") ** (1 / power)

    @cached_property
    def alphas(self) -> Tensor:
        """alpha_t = 1 - beta_t (falls with t)."""
        return 1 - self.betas

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """alpha_bar_t = alpha_1 … alpha_t (falls with t)."""
        return self.alphas.cumprod(0)

    @property
    def sqrt_alphas_cumprod(self) -> Tensor:
        """sqrt(alpha_bar_t): how much of the picture is left."""
        return self.alphas_cumprod.sqrt()

    @property
    def sqrt_one_minus_alphas_cumprod(self) -> Tensor:
        """sqrt(1 - alpha_bar_t): how much noise there is."""
        return (1 - self.alphas_cumprod).sqrt()

    @property
    def sqrt_recip_alphas(self) -> Tensor:
        """1 / sqrt(alpha_t)."""
        return self.alphas.rsqrt()

    @property
    def posterior_sigmas(self) -> Tensor:
        """sqrt(beta_tilde_t), the posterior's standard deviation; 0 at t = 1. DDPM, eq. 7."""
        bars = torch.cat([self.betas.new_ones(1), self.alphas_cumprod])
        return (self.betas * (1 - bars[:-1]) / (1 - bars[1:])).sqrt()

    # The forward process.

    def timestep(self, t: Tensor) -> Tensor:
        """What the network is told at time t: t - 1 for beta schedules, t itself for `flow`.

        Networks of the diffusers family count the beta schedules' timesteps from 0 to T - 1.
        """
        return t if self.schedule == "flow" else t - 1

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma of x_t = alpha x0 + sigma eps at time t, of t's shape, in float64."""
        if self.schedule == "flow":
            sigma = t.double() / self.num_timesteps
            return 1 - sigma, sigma
        alpha_bar = _alpha_bars(self, t.device)[t.long()]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t in one step: a sample of q(x_t | x_0), DDPM eq. 4. t is (B,) or ()."""
        alpha, sigma = self.alpha_sigma(t)
        return _fit(alpha, x0) * x0 + _fit(sigma, x0) * eps

    def forward_step(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t from x = x_{t-1}: a sample of q(x_t | x_{t-1}), DDPM eq. 2. t >= 1 is (B,) or ()."""
        alpha, variance = transition(*self.alpha_sigma(t - 1), *self.alpha_sigma(t))
        return _fit(alpha, x) * x + _fit(variance.sqrt(), x) * eps

    def posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (of x's shape) and variance (of t's shape, float64) of q(x_{t-1} | x_t, x_0).

        DDPM eq. 6 and 7. t >= 1 is (B,) or ().
        """
        before, now = self.alpha_sigma(t - 1), self.alpha_sigma(t)
        from_x0, from_x, variance = posterior_coefficients(*before, *now)
        return _fit(from_x0, x0) * x0 + _fit(from_x, x_t) * x_t, variance

    # What the network predicts. Salimans & Ho 2022 (arXiv:2202.00512) for v, Song et al. 2021
    # (arXiv:2011.13456) for the score.

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What the network must output for x_t = alpha x0 + sigma eps. alpha, sigma: () or (B,)."""
        alpha, sigma = _fit(alpha, x0), _fit(sigma, x0)
        match self.prediction:
            case "epsilon":
                return eps
            case "sample":
                return x0
            case "v_prediction":
                return alpha * eps - sigma * x0
            case "flow_prediction":
                return eps - x0
            case "score":
                return -eps / sigma

    def to_x0(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The estimate of x0 that a network's output amounts to: the inverse of `target`."""
        alpha, sigma = _fit(alpha, x_t), _fit(sigma, x_t)
        match self.prediction:
            case "epsilon":
                return (x_t - sigma * output) / alpha
            case "sample":
                return output
            case "v_prediction":
                return (alpha * x_t - sigma * output) / (alpha**2 + sigma**2)
            case "flow_prediction":
                return (x_t - sigma * output) / (alpha + sigma)
            case "score":
                return (x_t + sigma**2 * output) / alpha

    # Training.

    def sample_t(self, n: int, *, generator: torch.Generator) -> Tensor:
        """n times to train at, (n,), on the generator's device.

        Uniform over 1 … T for the beta schedules (DDPM, Algorithm 1); for `flow` real numbers in
        (0, T), logit-normal with mean 0 and deviation 1 (Esser et al. 2024, arXiv:2403.03206).
        """
        device = generator.device
        if self.schedule == "flow":
            z = torch.randn(n, generator=generator, device=device, dtype=torch.float32)
            return self.num_timesteps * z.sigmoid()
        return torch.randint(1, self.num_timesteps + 1, (n,), generator=generator, device=device)

    def loss(
        self, unet: Network, x0: Tensor, context: Tensor, *, noise: Tensor, t: Tensor
    ) -> Tensor:
        """The mean squared error of the prediction, one a picture, (B,). DDPM, eq. 14.

        x0 and noise are (B, C, H, W), context is the network's, t is (B,). The score's error is
        weighted by sigma^2 (Song et al. 2021, section 3.3), without which the smallest noise
        levels, where the target is eps / sigma, would drown all others.
        """
        alpha, sigma = self.alpha_sigma(t)
        x_t = _fit(alpha, x0) * x0 + _fit(sigma, x0) * noise
        output = unet(x_t, self.timestep(t), context)
        error = output.to(x0.dtype) - self.target(x0, noise, alpha, sigma)
        if self.prediction == "score":
            error = _fit(sigma, x0) * error
        return error.square().flatten(1).mean(1)

    # Sampling.

    def denoiser(
        self, unet: Network, context: Tensor, null_context: Tensor | None, guidance_scale: float
    ) -> Denoise:
        """The network as an estimate of x0, with classifier-free guidance (arXiv:2207.12598).

        context is (B, L, D); null_context, that of the empty prompt, is (B, L, D) or (1, L, D).
        Both halves go through the network in one call, [null, conditional]; a guidance_scale of 1
        turns guidance off, needs no null_context and costs half. Guiding the output is guiding x0,
        because `to_x0` is affine.
        """
        if guidance_scale == 1:

            def denoise(x: Tensor, level: NoiseLevel) -> Tensor:
                output = unet(x, level.timestep.expand(len(x)), context)
                return self.to_x0(output, x, level.alpha, level.sigma)

            return denoise

        if null_context is None:
            raise ValueError(f"guidance_scale={guidance_scale} needs a null_context; 1 does not")
        both = torch.cat([null_context.expand_as(context), context])

        def guided(x: Tensor, level: NoiseLevel) -> Tensor:
            timestep = level.timestep.expand(len(x)).repeat(2)
            null, conditional = unet(torch.cat([x, x]), timestep, both).chunk(2)
            output = null + guidance_scale * (conditional - null)
            return self.to_x0(output, x, level.alpha, level.sigma)

        return guided

    def levels(
        self,
        steps: int,
        *,
        grid: Grid = "ddim",
        karras: bool = False,
        device: torch.device | str | None = None,
    ) -> NoiseLevels:
        """The noise levels of a sampling run of `steps` steps, noisiest first.

        diffusers' schedulers choose timesteps in different ways even where their configurations
        agree; `grid` says whose: "ddim" (whole numbers; the only one in which the last level is
        alpha_bar_1 instead of data if `set_alpha_to_one` is false), "ddpm", "euler" (also Heun;
        `linspace` is not rounded) or "dpm" (of steps + 1 timesteps, the last gives way to data).
        `flow` has one grid, that of DPMSolverMultistepScheduler with `use_flow_sigmas`, which
        truncates the timesteps. `karras` spaces sigma / alpha by Karras et al. 2022
        (arXiv:2206.00364, eq. 5, rho = 7) over the whole schedule instead.

        Raises ValueError unless 1 <= steps <= T (T - 1 where "dpm" must leave a timestep out).
        """
        skips_one = (
            grid == "dpm" and self.schedule != "flow" and self.timestep_spacing != "trailing"
        )
        most = self.num_timesteps - int(skips_one and not karras)
        if not 1 <= steps <= most:
            raise ValueError(f"steps={steps} must be from 1 to {most}")
        if karras:
            timestep, alpha, sigma = self._karras(steps)
        elif self.schedule == "flow":
            sigma = (1 - _linspace(1.0, 1 / self.num_timesteps, steps + 1)).flip(0)[:-1]
            timestep, alpha = (sigma * self.num_timesteps).trunc(), 1 - sigma
        else:
            timestep = self._timesteps(steps, grid)
            alpha, sigma = self._from_ratio(_interpolate(self._ratios, timestep))
        if grid == "ddim" and not karras and not self.set_alpha_to_one:
            end = [0.0, float(self.sqrt_alphas_cumprod[0]), float(self._ratios[0])]
            end[2] *= end[1]
        else:
            end = [float(self.timestep(torch.tensor(0))), 1.0, 0.0]
        # Apple's GPUs have no float64.
        dtype = torch.float32 if torch.device(device or "cpu").type == "mps" else torch.float64
        timestep, alpha, sigma = (
            torch.cat([column, column.new_tensor([value])])
            for column, value in zip((timestep, alpha, sigma), end, strict=True)
        )
        return NoiseLevels(
            timestep.to(device, torch.float32), alpha.to(device, dtype), sigma.to(device, dtype)
        )

    def _timesteps(self, steps: int, grid: Grid) -> Tensor:
        """The beta schedules' timesteps, of 0 … T - 1, noisiest first (arXiv:2305.08891, Table 2).

        The arithmetic is diffusers', down to the rounding.
        """
        last = self.num_timesteps - 1
        points = steps + 1 if grid == "dpm" else steps
        if self.timestep_spacing == "trailing":
            stride = self.num_timesteps - (self.num_timesteps - self.num_timesteps / steps)
            return (self.num_timesteps - torch.arange(steps).double() * stride).round() - 1
        if self.timestep_spacing == "linspace":
            timesteps = _linspace(0.0, last, points).flip(0)[:steps]
            return timesteps if grid == "euler" else timesteps.round()
        stride = self.num_timesteps // points
        timesteps = (torch.arange(points) * stride).flip(0)[:steps]
        # diffusers runs off the end of its table where an offset leads past T - 1.
        return (timesteps + min(self.steps_offset, last - int(timesteps[0]))).double()

    def _karras(self, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        """Timesteps, alphas and sigmas of Karras et al. 2022, eq. 5, without the final one."""
        rho = 7.0
        table = self._ratios
        most, least = table[-1] ** (1 / rho), table[0] ** (1 / rho)
        ratios = (most + _linspace(0.0, 1.0, steps) * (least - most)) ** rho
        alpha, sigma = self._from_ratio(ratios)
        if self.schedule == "flow":
            return sigma * self.num_timesteps, alpha, sigma
        # The nearest timestep in log(sigma / alpha); for cosine diffusers truncates instead.
        logs, log = table.log(), ratios.log()
        below = (torch.searchsorted(logs, log, right=True) - 1).clamp(0, len(logs) - 2)
        weight = ((log - logs[below]) / (logs[below + 1] - logs[below])).clamp(0, 1)
        position = below + weight
        return position.trunc() if self.schedule == "cosine" else position.round(), alpha, sigma

    @cached_property
    def _ratios(self) -> Tensor:
        """sigma / alpha at the T timesteps (T - 1 for `flow`, where the last is infinite)."""
        if self.schedule == "flow":
            sigma = torch.arange(1, self.num_timesteps).double() / self.num_timesteps
            return sigma / (1 - sigma)
        return ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()

    def _from_ratio(self, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma on this path from sigma / alpha."""
        alpha = 1 / (1 + ratio) if self.schedule == "flow" else 1 / (1 + ratio**2).sqrt()
        return alpha, ratio * alpha

    def to_scheduler_config(self) -> dict[str, Any]:
        """This diffusion as scheduler/scheduler_config.json: see `formats.scheduler`."""
        return scheduler.to_config(**asdict(self))

    @classmethod
    def from_scheduler_config(cls, config: dict[str, Any]) -> Self:
        """The diffusion that a diffusers scheduler was configured for: see `formats.scheduler`.

        Raises ValueError for what is not supported.
        """
        return cls(**scheduler.from_config(config))


def transition(
    alpha_s: Tensor, sigma_s: Tensor, alpha_t: Tensor, sigma_t: Tensor
) -> tuple[Tensor, Tensor]:
    """a and v of q(x_t | x_s) = N(a x_s, v I) for a level s less noisy than t.

    Kingma et al. 2021 (arXiv:2107.00630), eq. 23; v is DDPM's beta_t if s = t - 1.
    """
    alpha = alpha_t / alpha_s
    return alpha, (sigma_t**2 - (alpha * sigma_s) ** 2).clamp(min=0)


def posterior_coefficients(
    alpha_s: Tensor, sigma_s: Tensor, alpha_t: Tensor, sigma_t: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """a, b and v of q(x_s | x_t, x_0) = N(a x_0 + b x_t, v I) for s less noisy than t.

    DDPM, eq. 7, for any two levels: v is beta_tilde_t if s = t - 1.
    """
    alpha, variance = transition(alpha_s, sigma_s, alpha_t, sigma_t)
    kept = (sigma_s / sigma_t) ** 2
    return alpha_s * variance / sigma_t**2, alpha * kept, variance * kept


def _fit(coefficient: Tensor, x: Tensor) -> Tensor:
    """A coefficient () or (B,) in a shape and dtype that multiply x (B, ...) and keep x's dtype."""
    if coefficient.ndim == 0:
        return coefficient
    return coefficient.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


@lru_cache(maxsize=16)
def _alpha_bars(diffusion: Diffusion, device: torch.device) -> Tensor:
    """alpha_bar_0 … alpha_bar_T, (T + 1,), on the device: training must not copy it every step."""
    with torch.inference_mode(False):
        bars = diffusion.alphas_cumprod
        return torch.cat([bars.new_ones(1), bars]).to(device)


def _cosine_betas(n: int) -> list[float]:
    """Nichol & Dhariwal 2021 (arXiv:2102.09672), eq. 17, but betas at most 0.999, as theirs."""

    def alpha_bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    return [min(1 - alpha_bar((i + 1) / n) / alpha_bar(i / n), 0.999) for i in range(n)]


def _linspace(start: float, end: float, n: int) -> Tensor:
    """numpy's linspace, whose last digits torch's does not share."""
    if n == 1:
        return torch.tensor([start], dtype=torch.float64)
    points = torch.arange(n).double() * ((end - start) / (n - 1)) + start
    points[-1] = end
    return points


def _interpolate(table: Tensor, position: Tensor) -> Tensor:
    """The table's values at real positions from 0 to its length - 1, linear between them."""
    below = position.long().clamp(max=len(table) - 2)
    return torch.lerp(table[below], table[below + 1], position - below)


def _check_choice(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{field}={value} must be one of {', '.join(allowed)}")
