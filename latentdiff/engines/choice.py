"""Which engine computes a pipeline, in which precision and where: checked before it is loaded."""

import torch

from latentdiff.engines import ENGINES
from latentdiff.models.precision import Precision, choose_dtype


def check_engine(
    engine: str, *, dtype: Precision, device: str | torch.device | None
) -> tuple[torch.dtype | None, torch.dtype | None]:
    """The dtype in which weights are loaded, and the one that OpenVINO computes in, if it does.

    Raises ValueError for an engine that there is not, and for a dtype or device that it does not
    compute in or on; ModuleNotFoundError where OpenVINO is not installed.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r} must be one of {', '.join(ENGINES)}")
    chosen = choose_dtype(dtype, device)
    if engine == "torch":
        return chosen, None
    if device is not None and torch.device(device).type != "cpu":
        raise ValueError(
            f"device={str(device)!r}: OpenVINO computes on the CPU here; leave device out, or take "
            'engine="torch"'
        )
    from latentdiff.engines.openvino import precision

    return torch.float32, precision(dtype)
