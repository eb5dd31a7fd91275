r"""The processes of a job: who this one is, and sums over all of them.

A minibatch is cut into `TrainConfig.shards` equal parts, each with noise keyed by (seed, step, part), and the gradient
is the mean over the parts, :math:`g = \frac{1}{A} \sum_a g_a`. W processes take A / W parts each and add up what they
found: the same sum as one process takes alone, but for the order of additions. All that they exchange is such sums.

Processes are those that torchrun or SLURM's srun started, that the caller made (torch.distributed), or that `launch`
starts; lightning-fabric finds its way among the first and the last, and this is the only file that knows it.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from aevb.config import InputError

__all__ = ["Processes", "join", "launch", "place"]


@final
@dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes that train together; by default one."""

    rank: int = 0
    size: int = 1
    device: torch.device | None = None  # the accelerator that is this process's, if there are several

    @property
    def is_writer(self) -> bool:
        """Whether this one writes checkpoints and history, and tells of progress."""
        return self.rank == 0

    def parts(self, shards: int, rows: int) -> range:
        """The parts of a batch of so many rows that are this process's."""
        if shards % self.size:
            raise InputError(
                f"`shards` must be a multiple of the {self.size} processes, which take as many parts of a batch each; "
                f"got {shards}. Give shards {math.ceil(shards / self.size) * self.size}, or start one process."
            )
        if rows % shards:
            raise InputError(
                f"`shards` must divide a batch, which here is all {rows} rows there are; got {shards}. Give a smaller "
                "batch_size."
            )
        each = shards // self.size
        return range(self.rank * each, (self.rank + 1) * each)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over the processes, in place, with the same bits in each.

        Raises:
            ConnectionError: If a process has ended.
        """
        if self.size > 1:
            try:
                torch.distributed.all_reduce(tensor)
            except RuntimeError as error:  # gloo's and nccl's own
                raise ConnectionError(
                    f"Process {self.rank} of {self.size} has lost the others: one has ended, and told why if it could."
                ) from error
        return tensor

    def barrier(self) -> None:
        """Wait for all."""
        if self.size > 1:
            self.sum_(torch.zeros(1, device=self.device)).item()

    def gather(self, number: int) -> list[int]:
        """The number that each process holds, by rank."""
        numbers = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        numbers[self.rank] = number
        found: list[int] = self.sum_(numbers).tolist()
        return found

    def tell(self, text: str) -> list[str]:
        """What each process says, by rank."""
        said = torch.tensor(list(text.encode()), dtype=torch.uint8)
        texts = torch.zeros(self.size, max(self.gather(len(said))), dtype=torch.uint8, device=self.device)
        texts[self.rank, : len(said)] = said
        return [bytes(row).rstrip(b"\0").decode() for row in self.sum_(texts).tolist()]

    @torch.no_grad()
    def share_(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the writer's values, in place."""
        if self.size > 1:
            for tensor in tensors:
                whole = tensor.detach().clone() if tensor.is_floating_point() else tensor.long()  # sums know no bool
                tensor.copy_(self.sum_(whole if self.is_writer else torch.zeros_like(whole)))


def join(kind: str = "cpu") -> Processes:
    """The processes that this one was started among, with an accelerator of a kind each.

    Raises:
        InputError: If there are several, and lightning-fabric, which joins them, is not installed.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        launcher, started, nodes = _started()
        if started == 1:
            return Processes()
        _set_up(launcher, kind, started // nodes, nodes)
    return _joined(kind)


def launch(devices: int, nodes: int = 1, kind: str | None = None) -> Processes:
    """Start this command once for each device, on the first of which it goes on here; or join those started already.

    On several nodes the command is started once a node, with MASTER_ADDR, MASTER_PORT and NODE_RANK in its environment.

    Args:
        devices: How many a node has.
        nodes: Machines.
        kind: Of device; if None GPUs where there are as many, else processes on the processor.

    Raises:
        InputError: If torchrun or srun started another number, or the environment does not tell where the nodes are.
    """
    launcher, started, there = _started()
    if started > 1 and devices * nodes not in (1, started):
        raise InputError(
            f"{launcher} started {started} processes, and `devices` {devices} times `nodes` {nodes} are "
            f"{devices * nodes}. Leave both out: the processes are found."
        )
    if started == devices * nodes == 1:
        return Processes()
    if kind is None:
        kind = "cuda" if torch.cuda.device_count() >= max(devices, started // there) else "cpu"
    if started == 1 and not torch.distributed.is_initialized():
        lacking = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if name not in os.environ]
        if nodes > 1 and lacking:
            raise InputError(
                f"`nodes` {nodes} needs {' and '.join(lacking)} in the environment: the address of the first node, a "
                "port that is free there, and the number of this node from 0. torchrun and srun set them by themselves."
            )
        _set_up("aevb", kind, devices, nodes)
    return join(kind)


def place() -> tuple[int, int]:
    """Which of the processes started together this one is, and how many they are; for work that needs no joining."""
    launcher, size, _ = _started()
    return (int(os.environ["RANK" if launcher == "torchrun" else "SLURM_PROCID"]) if size > 1 else 0), size


def _started() -> tuple[str, int, int]:
    """Which launcher started this process, how many it started together, and on how many machines."""
    if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        size = int(os.environ["WORLD_SIZE"])
        return "torchrun", size, size // int(os.environ["LOCAL_WORLD_SIZE"])
    # Of a step, not of the job: in a batch script that calls python without srun there is but one.
    nodes = os.environ.get("SLURM_STEP_NUM_NODES", os.environ.get("SLURM_NNODES", "1"))
    return "srun", int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)), int(nodes)


def _set_up(launcher: str, kind: str, devices: int, nodes: int) -> None:
    try:
        from lightning_fabric import Fabric
        from lightning_fabric.plugins import environments as known
    except ModuleNotFoundError as error:
        raise InputError(
            "Training on several processes needs lightning-fabric. Install it: pip install 'aevb[processes]'"
        ) from error
    # Named, not left to be guessed: in a job of SLURM without srun it would wait for processes that nobody started.
    if launcher == "srun":
        os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(devices))  # SLURM tells it only where it was asked for
    names = {"torchrun": "TorchElasticEnvironment", "srun": "SLURMEnvironment", "aevb": "LightningEnvironment"}
    fabric: Any = Fabric(
        accelerator=kind, devices=devices, num_nodes=nodes, strategy="ddp", plugins=[getattr(known, names[launcher])()]
    )
    told, level = logging.getLogger("lightning_fabric"), logging.getLogger("lightning_fabric").level
    told.setLevel(logging.WARNING)  # it would greet on standard error
    try:
        fabric.launch()
    except ValueError as error:  # the launcher's numbers contradict one another
        raise InputError(f"The processes that {launcher} started could not be joined. {error}") from error
    finally:
        told.setLevel(level)


def _joined(kind: str) -> Processes:
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if size == 1:
        return Processes()
    device = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else None
    return Processes(rank=rank, size=size, device=device)
