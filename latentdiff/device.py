"""Which device computes: the one that is named, or an accelerator if there is one, or the CPU."""

import torch

Target = str | torch.device | torch.dtype
"""What networks are moved or converted to."""


def accelerator() -> torch.device | None:
    """The accelerator of this machine, if there is one that can be used."""
    return torch.accelerator.current_accelerator(check_available=True)


def default_device(device: str | torch.device | None = None, engine: str = "torch") -> torch.device:
    """The device that is given, or an accelerator, where the engine computes on one, or the CPU."""
    if device is not None:
        return find_device(device) if engine == "torch" else torch.device(device)
    return (None if engine == "openvino" else accelerator()) or torch.device("cpu")


def find_device(name: str | torch.device | None, engine: str = "torch") -> torch.device:
    """The named device, checked by using it; without a name the default.

    Raises ValueError for a device that cannot be used on this machine.
    """
    if name is None:
        return default_device(engine=engine)
    try:
        device = torch.zeros(1, device=name)
        device.item()  # which "meta" cannot
        return device.device
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device={str(name)!r} cannot be used on this machine: {reason}"
        ) from error


def targets(device: Target | None, dtype: torch.dtype | None) -> list[Target]:
    """What `to(device, dtype)` asks for, where a dtype may stand alone; ValueError for two."""
    if isinstance(device, torch.dtype) and dtype is not None:
        raise ValueError(f"to({device}, {dtype}): give a device and a dtype, in this order")
    for given in (dtype, device if isinstance(device, torch.dtype) else None):
        if given is not None and not (isinstance(given, torch.dtype) and given.is_floating_point):
            raise ValueError(f"dtype={given!r} must be a torch.dtype such as torch.float16")
    return [target for target in (device, dtype) if target is not None]
