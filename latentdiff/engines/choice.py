"""Which engine computes a pipeline, in which precision and where: checked before it is loaded."""

from typing import Literal

import torch

from latentdiff.engines import ENGINES

Precision = torch.dtype | Literal["auto"] | None
"""What a pipeline computes in. "auto": float32 with torch, with OpenVINO what is fastest on this
processor. None: with torch, that of the weights."""


def check_engine(
    engine: str, *, dtype: Precision, device: str | torch.device | None
) -> tuple[torch.dtype | None, torch.dtype | None]:
    """The dtype in which weights are loaded, and the one that OpenVINO computes in, if it does.

    Raises ValueError for an engine that there is not, and for a dtype or device that it does not
    compute in or on; ModuleNotFoundError where OpenVINO is not installed.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r} must be one of {', '.join(ENGINES)}")
    if isinstance(dtype, str) and dtype != "auto":
        raise ValueError(f'dtype={dtype!r} must be "auto", a dtype of torch or None')
    if engine == "torch":
        return (torch.float32 if dtype == "auto" else dtype), None
    if device is not None and torch.device(device).type != "cpu":
        raise ValueError(
            f"device={str(device)!r}: OpenVINO computes on the CPU here; leave device out, or take "
            'engine="torch"'
        )
    from latentdiff.engines.openvino import precision

    return torch.float32, precision(dtype)
