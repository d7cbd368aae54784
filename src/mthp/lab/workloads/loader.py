"""A program with worker processes that make batches for training."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mthp.lab.workloads.parameters import Count, Duration, Share, Size
from mthp.lab.workloads.program import Life, Program
from mthp.sim.mm import Mm


@dataclass(frozen=True)
class TorchLoader:
    """A data loader: a parent with a dataset, forked workers that copy it by reading, and short-lived batches.

    Workers are forked when an epoch begins and end with it (torch.utils.data.DataLoader, ``num_workers``); each keeps
    ``prefetch_factor`` batches, 2 by default.

    Attributes:
        dataset: bytes of Python objects in the parent.
        workers: forked processes.
        batch: bytes of one batch.
        batches: batches made every second, by all workers together.
        prefetch: batches that are kept, for each worker.
        epoch: lifetime of workers.
        objects: part of a page's worth of objects of the dataset that each batch reads, for one byte of batch.
    """

    SOURCE: ClassVar[str] = "torch.utils.data.DataLoader; PyTorch issue 13246; mallopt(3) M_MMAP_THRESHOLD"

    dataset: Size = 96 << 20
    workers: Count = 2
    batch: Size = 8 << 20
    batches: Count = 4
    prefetch: Count = 2
    epoch: Duration = 20.0
    objects: Share = 0.02

    @property
    def most(self) -> int:
        """The dataset, with a full copy for every worker, and the batches."""
        return self.dataset * (1 + self.workers) + self.batch * (self.prefetch * max(1, self.workers) + 1)

    def live(self, program: Program) -> Life:
        """Load the dataset, then epoch after epoch."""
        data, total = program.map(self.dataset), program.pages(self.dataset)
        program.write(data, np.arange(total))
        workers: list[Mm] = []
        kept: deque[int] = deque()
        due, ends = 0.0, 0.0
        while True:
            now = yield
            if now >= ends:
                for worker in workers:
                    program.end_child(worker)
                workers = [program.fork() for _ in range(self.workers)]
                ends = now + self.epoch
            # A fraction of a batch is kept for the next tick.
            due += self.batches * program.tick
            for _ in range(int(due)):
                due -= 1
                if workers:
                    worker = workers[int(program.rng.integers(len(workers)))]
                    sample = program.rng.integers(0, total, int(program.pages(self.batch) * self.objects) + 1)
                    # Reading a Python object writes its reference count, so the page is copied for the worker (PyTorch
                    # issue 13246).
                    program.write(data, sample, mm=worker)
                # Larger than malloc's threshold, so mapped, and unmapped when it is freed (mallopt(3),
                # M_MMAP_THRESHOLD).
                start = program.map(self.batch)
                program.write(start, np.arange(program.pages(self.batch)))
                kept.append(start)
                while len(kept) > self.prefetch * max(1, self.workers):
                    program.unmap(kept.popleft(), self.batch)
