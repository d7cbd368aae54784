"""Models of programs for the simulated machine, which allocate, age, fork and free memory as real ones do.

Each model is a dataclass of its parameters, with its sources in the docstring, and a generator of *moves*
(:mod:`~mthp.lab.workloads.program`). None has code of the program that it models; it has the same pattern of which
pages are touched, freed and copied, and when.
"""

from __future__ import annotations

from mthp.lab.workloads.arena import SparseArena
from mthp.lab.workloads.golang import GoHeap
from mthp.lab.workloads.loader import TorchLoader
from mthp.lab.workloads.microservice import Service
from mthp.lab.workloads.program import Model
from mthp.lab.workloads.redis import Redis
from mthp.lab.workloads.replayed import Replay

MODELS: dict[str, type[Model]] = {
    "redis": Redis,
    "go-heap": GoHeap,
    "sparse-arena": SparseArena,
    "torch-loader": TorchLoader,
    "service": Service,
    "recording": Replay,
}
"""The models, by the name that scenarios use."""
