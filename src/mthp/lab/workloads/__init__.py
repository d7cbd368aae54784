"""Programs for the simulated machine that use memory as real ones do: how they allocate, age, fork and give back.

Each model is a dataclass of its parameters, whose docstring says what it follows, and a generator of *moves*
(:mod:`~mthp.lab.workloads.program`). None has code of the program that it stands for; what they share with it is which
pages it touches, frees and copies, and when.
"""

from __future__ import annotations

from mthp.lab.workloads.arena import SparseArena
from mthp.lab.workloads.golang import GoHeap
from mthp.lab.workloads.loader import TorchLoader
from mthp.lab.workloads.program import Model
from mthp.lab.workloads.redis import Redis
from mthp.lab.workloads.replay import Replay
from mthp.lab.workloads.service import Service

MODELS: dict[str, type[Model]] = {
    "redis": Redis,
    "go-heap": GoHeap,
    "sparse-arena": SparseArena,
    "torch-loader": TorchLoader,
    "service": Service,
    "recording": Replay,
}
"""The models, by the name that scenarios use."""
