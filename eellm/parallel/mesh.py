"""The processes of a run and the mesh that they form: pp × dp_replicate × dp_shard × tp, tp innermost.

torchrun says who we are through environment variables; this is the one module that reads them. A run of one process
has no process group and no mesh.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from eellm.config.parallel import ParallelConfig
from eellm.errors import ConfigError
from eellm.model.init import torch_device

AXES = ("pp", "dp_replicate", "dp_shard", "tp")


@dataclass(frozen=True, kw_only=True, eq=False)
class World:
    """This process among the others."""

    rank: int = 0
    """Of all processes."""
    size: int = 1
    """Number of processes."""
    device: torch.device = torch.device("cpu")
    """Where this process computes."""
    mesh: DeviceMesh | None = None
    """With the dimensions `AXES`; None for a single process."""
    timeout: timedelta | None = None
    """After which a process that waits for another in vain gives up; None: torch's own."""
    store: dist.Store = field(default_factory=dist.HashStore)
    """A small table of strings that all processes share."""

    def index(self, axis: str) -> int:
        """This process's place along `axis`."""
        return 0 if self.mesh is None else self.mesh[axis].get_local_rank()

    def axis_size(self, axis: str) -> int:
        """Number of processes along `axis`."""
        return 1 if self.mesh is None else self.mesh[axis].size()

    def submesh(self, *axes: str) -> DeviceMesh:
        """The mesh along `axes`."""
        assert self.mesh is not None, "a single process has no mesh"
        return self.mesh[axes]

    @property
    def dp_index(self) -> int:
        """Which part of a global batch's rows is ours."""
        return self.index("dp_replicate") * self.axis_size("dp_shard") + self.index("dp_shard")

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files that a run has one of."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Adds up a small tensor over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def max(self, values: torch.Tensor) -> torch.Tensor:
        """The largest of each value over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def background_group(self) -> dist.ProcessGroup | None:
        """A group of all processes, over the CPU, for work beside the training; None for a single process."""
        if self.size == 1:
            return None
        group = dist.new_group(backend="gloo", timeout=self.timeout)
        assert isinstance(group, dist.ProcessGroup), "all processes are in it"
        return group

    def share(self, value: object) -> object:
        """Rank 0's plain `value`, on every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every process's plain `value`, in the order of ranks, on rank 0; nothing elsewhere."""
        if self.size == 1:
            return [value]
        values = [None] * self.size if self.is_main else None
        dist.gather_object(value, values)
        return values or []


def join(config: ParallelConfig, *, device: str = "cpu") -> World:
    """Meets the other processes of torchrun. Raises ConfigError where the layout doesn't fit their number.

    A second call, of a process that has joined already, makes the mesh anew on the same process group.
    """
    size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    check_world_size(config, size)
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = 'cuda': torch finds no GPU here; use cpu")
    place = torch.device(device, int(os.environ.get("LOCAL_RANK", "0"))) if device == "cuda" else torch_device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if size == 1:
        return World(device=place)
    # NOTE longer than the watch's, which knows who is to blame; a time-out of gloo's or NCCL's names who suffers
    timeout = timedelta(seconds=2 * config.timeout_s + 60) if config.timeout_s else None
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timeout, **_rendezvous())
    shape = tuple(getattr(config, axis) for axis in AXES)
    mesh = init_device_mesh(place.type, shape, mesh_dim_names=AXES)
    return World(rank=dist.get_rank(), size=size, device=place, mesh=mesh, timeout=timeout, store=_open_store())


def check_world_size(config: ParallelConfig, size: int) -> None:
    """Raises ConfigError, with the command or the layout that would fit, unless the layout takes `size` processes."""
    if config.world_size == size:
        return
    product = " × ".join(f"{axis} {getattr(config, axis)}" for axis in AXES)
    rest = config.pp * config.tp * config.dp_replicate
    fits = f", or set parallel.dp_shard = {size // rest}" if size % rest == 0 else ""
    raise ConfigError(
        f"parallel: {product} = {config.world_size} processes, and {size} {'is' if size == 1 else 'are'} running; "
        f"start it with torchrun --nproc_per_node {config.world_size}{fits}"
    )


def _rendezvous() -> dict[str, Any]:
    """How the processes find each other: as torch does by itself, but for a restart by torchrun.

    NOTE then torch 2.13 offers the store of the attempt before, where gloo finds the addresses of processes that are
    dead; each attempt gets a part of its own.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    served = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", served)
    return {"store": store, "rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}


def _open_store() -> dist.Store:
    """Rank 0 serves it at a free port."""
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    is_main = dist.get_rank() == 0
    served = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False) if is_main else None
    port = [served.port if served is not None else 0]
    dist.broadcast_object_list(port, src=0)
    return served if served is not None else dist.TCPStore(host, port[0], is_master=False, wait_for_workers=False)


def is_launched() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def new_group(ranks: Sequence[int]) -> dist.ProcessGroup:
    """A process group of some ranks, this one among them; they alone call it."""
    group = dist.new_group(list(ranks), use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup), ranks
    return group


def leave() -> None:
    """Ends the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
