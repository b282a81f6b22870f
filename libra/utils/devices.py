"""The device that a command runs on."""

import os

import torch


def find_device(named: str | None = None) -> torch.device:
    """The device of that name; for None or ``auto`` the GPU where there is one, else the CPU.

    Raises:
        ValueError: for a name that is none, and for a GPU where there is none.
    """
    if named in (None, "auto"):
        named = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(named)
    except RuntimeError:
        raise ValueError(f"--device: {named} is not a device; write cpu or cuda:0") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here; use --device cpu")
    return device


def all_devices() -> list[str]:
    """The names of all GPUs; the CPU's where there is none."""
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"]


def rank_device() -> str:
    """The device of this process among those that torchrun or accelerate started on a machine."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def device_name(device: torch.device) -> str:
    """What a report calls a device: a GPU's own name, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
