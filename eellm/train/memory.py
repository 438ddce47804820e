"""Peak memory of each pipeline stage's processes: allocated on a GPU, resident on a CPU."""

import resource
import sys

import torch

from eellm.parallel.mesh import World


def reset_peak_memory(device: torch.device) -> None:
    """Starts a new peak on a GPU; a process's resident peak can't be started anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_mb(world: World) -> list[float]:
    """In MiB, by rank of the pipeline: the largest among the processes there."""
    peaks = torch.zeros(world.axis_size("pp"), dtype=torch.float64, device=world.device)
    peaks[world.index("pp")] = _peak_bytes(world.device) / 2**20
    return [round(peak, 1) for peak in world.max(peaks).tolist()]


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
