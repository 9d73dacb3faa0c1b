"""What the processes of a run do together, on top of accelerate.

Everything here works in one process as well, where it does nothing but its local part.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)
from torch import Tensor, nn

from spo.errors import STOPPED, RunError, UserError
from spo.launch.exit_status import keep_status
from spo.launch.liveness import Liveness
from spo.launch.peers import connect_peers, own_name
from spo.types import PreferencePairs


class Workers:
    """The processes of a run, seen from one of them.

    Precision and gradient accumulation are the learner's affair; accelerate starts the processes and
    wraps the UNet. Where one process fails, dies, or is silent for `rank_timeout` seconds, the others
    stop; a context manager, so that the end of its block tells them how this one ended.
    """

    def __init__(self, rank_timeout: int) -> None:
        if rank_timeout < 1:
            raise UserError(f"rank_timeout: {rank_timeout} must be a whole number from 1.")
        _refuse_sharding()
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        # The main process may have to download before the others can go on.
        group = InitProcessGroupKwargs(timeout=timedelta(minutes=30))
        self.accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[ddp, group])
        self.device = self.accelerator.device
        self.rank = self.accelerator.process_index
        self.count = self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process
        self._shared_error: UserError | None = None  # that all processes raise
        self._liveness = None
        if self.count > 1:
            with self.together():
                peers = connect_peers(self.rank, self.count, self.from_main)
            self._liveness = Liveness(self.rank, peers, rank_timeout)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        """Leave the process group, or tell the others what went wrong here."""
        if self._liveness is not None:
            if error is None or error is self._shared_error or _is_stop(error):
                self._liveness.leave()
            else:
                keep_status()
                self._liveness.fail(" ".join(f"{kind.__name__}: {error}".split()))
        self.accelerator.end_training()

    def wrap(self, unet: nn.Module) -> nn.Module:
        """The UNet for the pass with gradients: its DDP wrapper, or itself in one process."""
        return self.accelerator.prepare_model(unet, device_placement=False)

    def from_main(self, value: Any) -> Any:
        """The main process's `value`, everywhere."""
        return broadcast_object_list([value])[0]

    def gather(self, values: list) -> list:
        """The items of all processes' lists, in the order of their ranks."""
        return gather_object(values)

    def gather_to_main(self, values: list) -> list:
        """The items of all processes' lists on the main process, in the order of their ranks.

        On the others, nothing: for what is too large to be sent to every process.
        """
        if self.count == 1:
            return values
        gathered = [None] * self.count if self.is_main else None
        dist.gather_object(values, gathered)
        return [value for part in gathered or () for value in part]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A UserError that any process meets within is raised on all at the end; none waits forever."""
        error = None
        try:
            yield
        except UserError as caught:
            error = caught
        met = [e for e in self.gather([error]) if e is not None]
        if met:
            self._shared_error = met[0]
            raise met[0]

    def check_equal(self, what: str, tensors: Mapping[str, Tensor]) -> None:
        """RunError on every process unless the fp32 `tensors` are the same on all, bit for bit.

        Compares a sum of the bits of each tensor.
        """
        sums = [tensor.detach().view(torch.int32).sum() for tensor in tensors.values()]
        (_, first), *others = self.gather([(own_name(self.rank), torch.stack(sums).tolist())])
        different = [name for name, own in others if own != first]
        with self.together():
            if different:
                raise RunError(
                    f"{what} of {', '.join(different)} differs from that of rank 0, so this run is "
                    "none of one model; go on from an earlier checkpoint, on GPUs of one kind."
                )

    def sum(self, values: dict[str, Tensor]) -> dict[str, float]:
        """Sums of scalars over all processes; every process passes the same keys."""
        stacked = torch.stack([value.double() for value in values.values()])
        total = self.accelerator.reduce(stacked, reduction="sum")
        return dict(zip(values, total.tolist(), strict=True))

    def sum_named(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Returns sums of scalars over all processes; a name that a process lacks counts as 0 there."""
        names = dict.fromkeys(name for own in self.gather([list(values)]) for name in own)
        zero = torch.zeros((), device=self.device)
        return self.sum({name: values.get(name, zero) for name in names}) if names else {}

    def deal(
        self, pairs: PreferencePairs, generator: torch.Generator
    ) -> tuple[PreferencePairs, int]:
        """Shuffle the pairs of all processes together and deal them out evenly.

        The permutation is drawn by the main process from its `generator`. Returns this process's
        share, in training order, and how many pairs were left over (the last total mod processes).
        As long as minibatch x processes x accumulation stays the same, so do the pairs of each update,
        whatever the number of processes.
        """
        counts = self.gather([len(pairs)])
        total = sum(counts)
        permutation = self.from_main(torch.randperm(total, generator=generator))
        if self.count == 1:
            return pairs.select(permutation.to(self.device)), 0
        share = total // self.count
        position = torch.argsort(permutation)  # of each pair in the shuffled order
        owner, slot = position % self.count, position // self.count
        source = torch.repeat_interleave(torch.arange(self.count), torch.tensor(counts))
        dealt = slot < share
        mine = source == self.rank
        sent = [int((dealt & mine & (owner == r)).sum()) for r in range(self.count)]
        to_me = dealt & (owner == self.rank)
        received = [int((to_me & (source == r)).sum()) for r in range(self.count)]
        # Sent grouped by receiver; on both sides in the order in which the pairs arose.
        order = torch.argsort(owner[mine & dealt], stable=True)
        index = dealt[mine].nonzero().flatten()[order]

        def exchange(rows: Tensor) -> Tensor:
            result = rows.new_empty(sum(received), *rows.shape[1:])
            dist.all_to_all_single(result, rows.contiguous(), received, sent)
            return result

        arrived = pairs.select(index.to(self.device)).map_rows(exchange)
        in_order = torch.argsort(slot[to_me]).to(self.device)
        return arrived.select(in_order), total - share * self.count

    @cached_property
    def _on_cpu(self) -> dist.ProcessGroup:
        """All processes, for what must not wait for a GPU."""
        return dist.new_group(backend="gloo")

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in at least one process."""
        if self.count == 1:
            return flag
        found = torch.tensor(int(flag))
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self._on_cpu)
        return bool(found)

    @contextlib.contextmanager
    def to_main(self, tensors: Mapping[str, Tensor]) -> Iterator[Iterator[dict[str, Tensor]]]:
        """In the main process, within the context: the tensors of each process in turn, on the CPU.

        One process's are held at a time. In the others it is empty.
        """
        mine = {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in tensors.items()
        }
        kinds = self.gather([[(name, t.shape, t.dtype) for name, t in mine.items()]])

        def receive(rank: int) -> dict[str, Tensor]:
            if rank == 0:
                return mine
            received = {name: torch.empty(shape, dtype=dtype) for name, shape, dtype in kinds[rank]}
            for tensor in filter(torch.numel, received.values()):
                dist.recv(tensor, rank, group=self._on_cpu)
            return received

        arriving = map(receive, range(self.count) if self.is_main else ())
        try:
            yield arriving
        finally:
            for _ in arriving:  # those that an error left: their senders wait
                pass
            if not self.is_main:
                for tensor in filter(torch.numel, mine.values()):
                    dist.send(tensor, 0, group=self._on_cpu)


def _is_stop(error: BaseException) -> bool:
    """Whether it ends a run that was asked to stop, which the processes agree on."""
    status = error.code if isinstance(error, SystemExit) else getattr(error, "exit_status", None)
    return status == STOPPED


def _refuse_sharding() -> None:
    """UserError where accelerate was told to split the model over the processes."""
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise UserError(
                f"distributed_type {name} in the accelerate config: every process holds the whole "
                "model here; use MULTI_GPU (config/accelerate), and gradient checkpointing or a "
                "smaller train.batch_size to save memory."
            )
