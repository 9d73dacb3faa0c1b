"""Operations that all processes of a run call together, on top of accelerate.

In a single process each does its local part only.
"""

import contextlib
import os
import warnings
from collections import Counter
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
)
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from spo.command_line.flags import is_orphan
from spo.errors import RunError, Stopped, UserError
from spo.models.gpu import check_driver
from spo.types import PreferencePairs


class Workers(contextlib.AbstractContextManager):
    """The processes of a run, seen from one of them.

    Precision and gradient accumulation are the learner's; accelerate joins the processes and wraps
    the UNet. A collective that a process does not answer within `rank_timeout` seconds fails.
    """

    def __init__(self, rank_timeout: int) -> None:
        if rank_timeout < 1:
            raise UserError(f"rank_timeout: {rank_timeout} must be a whole number from 1.")
        for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
            if os.environ.get(f"ACCELERATE_USE_{name}") == "true":
                raise UserError(
                    f"distributed_type {name} in the accelerate config: every process holds the whole "
                    "model here; use MULTI_GPU."
                )
        check_driver()
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        self._timeout = timedelta(seconds=rank_timeout)
        group = InitProcessGroupKwargs(timeout=self._timeout)
        self.accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[ddp, group])
        self.device = self.accelerator.device
        self.rank = self.accelerator.process_index
        self.count = self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        """Leaves the process group; after an error without waiting for the other processes."""
        if isinstance(error, Exception) and not is_orphan():
            # Before the connections close: errors that follow from this one must be later.
            get_error_handler().record_exception(error)
        if error is not None and not isinstance(error, Stopped) and self.device.type == "cuda":
            # Destroying NCCL's group waits for its collectives, which the others may never join. torch
            # aborts what is left of it when the process ends.
            if "_on_cpu" in vars(self):
                dist.destroy_process_group(self._on_cpu)
            return
        self.accelerator.end_training()

    def wrap(self, unet: nn.Module) -> nn.Module:
        """Returns the UNet for the pass with gradients: its DDP wrapper, or itself in one process."""
        with warnings.catch_warnings():
            # Its new name means something else, and is unknown to accelerate.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return self.accelerator.prepare_model(unet, device_placement=False)

    def from_main(self, value: Any) -> Any:
        """Returns the main process's `value` on every process."""
        return broadcast_object_list([value])[0]

    def gather(self, values: list, only_to_main: bool = False) -> list:
        """Returns the items of all processes' lists, in the order of the ranks.

        `only_to_main` is for values that are too large to be sent to every process; all but the main
        process get []. Tensors must be on the CPU.
        """
        if self.count == 1:
            return values
        parts = [None] * self.count
        if only_to_main:
            dist.gather_object(values, parts if self.is_main else None, group=self._on_cpu)
        else:
            dist.all_gather_object(parts, values, group=self._on_cpu)
        return [value for part in parts for value in part or ()]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Raises a UserError of any process on all of them at the end of the context."""
        error = None
        try:
            yield
        except UserError as caught:
            error = caught
        met = [e for e in self.gather([error]) if e is not None]
        if met:
            raise met[0]

    def check_equal(self, what: str, tensors: Mapping[str, Tensor]) -> None:
        """Raises RunError on every process unless all have the same fp32 `tensors`, bit for bit.

        Compares the sum of the bits of each tensor.
        """
        sums = [tensor.detach().view(torch.int32).sum() for tensor in tensors.values()]
        found = self.gather([torch.stack(sums).tolist()])
        different = [str(rank) for rank, own in enumerate(found) if own != found[0]]
        if different:
            raise RunError(
                f"{what} of rank {', '.join(different)} differs from that of rank 0, so this run is "
                "none of one model; go on from an earlier checkpoint, on GPUs of one kind."
            )

    def sum(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Returns sums of scalars over all processes; a name that a process lacks counts as 0 there."""
        total = Counter()
        for part in self.gather([{name: float(value) for name, value in values.items()}]):
            total.update(part)
        return dict(total)

    def deal(
        self, pairs: PreferencePairs, generator: torch.Generator
    ) -> tuple[PreferencePairs, int]:
        """Shuffles the pairs of all processes together and deals them out evenly.

        The main process draws the permutation from its `generator`. Returns this process's share, in
        training order, and the number of pairs left over (the last total mod processes). The pairs of
        an update depend on minibatch x processes x accumulation only, not on the three factors.
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
        """The group of all processes for exchanges that need not wait for a GPU."""
        return dist.new_group(timeout=self._timeout, backend="gloo")
