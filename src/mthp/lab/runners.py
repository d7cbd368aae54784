"""The runners of a sweep's tasks: processes of this machine, or a cluster."""

from __future__ import annotations

import contextlib
import importlib
import logging
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from mthp.errors import MthpError, UnsupportedError, UsageError
from mthp.lab.sweep import Done, Runner, Task, measure

SILENCE = 5.0
"""Seconds without a connection to the scheduler until it counts as gone."""

LOOK = 0.02
"""Seconds between two checks for finished tasks."""

AHEAD = 4
"""Tasks sent to the cluster for every thread of its workers, so that no thread waits for the next."""

_LOGGERS = (
    "distributed",
    "distributed.client",
    "distributed.core",
    "distributed.comm",
    "tornado.application",
    "asyncio",
)

_GO_ON = "finished inputs are kept: run the same command again to continue"


def local(jobs: int | None = None) -> Runner:
    """Return a runner in processes of this machine.

    Args:
        jobs: number of processes; None for as many as this process may use processors.

    Raises:
        UsageError: fewer than one process.
        UnsupportedError: joblib is missing.
    """
    joblib = _imported("joblib", "lab")
    if jobs is not None and jobs < 1:
        raise UsageError(f"{jobs} jobs are too few", help="use --jobs 1 or more")
    count: int = jobs or joblib.cpu_count()

    def run(tasks: Sequence[Task]) -> Generator[Done, None, None]:
        # One task at a time needs no other process.
        if count == 1 or len(tasks) == 1:
            yield from map(measure, tasks)
            return
        # One task in a batch, and in any order: a result is kept as soon as it is finished.
        parallel = joblib.Parallel(n_jobs=count, return_as="generator_unordered", batch_size=1)
        try:
            yield from parallel(joblib.delayed(measure)(task) for task in tasks)
        except (RuntimeError, OSError) as error:
            # A worker was killed, most often because the machine ran out of memory.
            raise MthpError(f"a worker process died: {str(error).splitlines()[0]}", help=_GO_ON) from error

    return run


def dask(address: str) -> Runner:
    """Return a runner on a Dask scheduler. Its workers need this package, and the inputs at the same paths.

    Args:
        address: address of the scheduler, such as ``tcp://127.0.0.1:8786``.

    Raises:
        UsageError: `address` is not such an address.
        UnsupportedError: distributed is missing.
    """
    distributed = _imported("distributed", "dask")
    if "://" not in address:
        raise UsageError(f"{address!r} is not the address of a scheduler", help="write it as tcp://HOST:8786")

    def run(tasks: Sequence[Task]) -> Generator[Done, None, None]:
        with _quiet():
            yield from connected(tasks)

    def connected(tasks: Sequence[Task]) -> Generator[Done, None, None]:
        try:
            client = distributed.Client(address, timeout=SILENCE, set_as_default=False, name="mthp-sweep")
        except (OSError, TimeoutError, ValueError) as error:
            raise UnsupportedError(
                f"no Dask scheduler answers at {address}: {str(error).splitlines()[0] if str(error) else 'timeout'}",
                help="start one with: dask scheduler; and workers with: dask worker ADDRESS",
            ) from error
        try:
            yield from _on_cluster(distributed, client, address, tasks)
        finally:
            _let_go(client)

    return run


def _on_cluster(distributed: Any, client: Any, address: str, tasks: Sequence[Task]) -> Generator[Done, None, None]:
    """Send tasks a few at a time, and yield their results as they arrive."""
    # Reversed, because pop() takes the last.
    waiting = list(reversed(tasks))
    running: set[Any] = set()
    lost_since: float | None = None
    while waiting or running:
        try:
            # Also before the first worker is there. While the client reconnects, nothing is sent.
            room = AHEAD * max(1, sum(client.nthreads().values())) if client.status == "running" else 0
            while waiting and len(running) < room:
                # Not pure: a scheduler returns the result of an equal task that it knows, and the file may have changed
                # since.
                running.add(client.submit(measure, waiting.pop(), pure=False, retries=2))
            finished = [future for future in running if future.done()]
            if not finished:
                time.sleep(LOOK)
            for future in finished:
                running.discard(future)
                yield future.result(timeout=SILENCE)
        except (OSError, TimeoutError, distributed.CancelledError) as error:
            raise _gone(address, error) from error
        except distributed.KilledWorker as error:
            raise MthpError(f"workers died over {error.task}", help=_GO_ON) from error
        if client.status == "running":
            lost_since = None
            continue
        # The client reconnects by itself; only a long silence is an error.
        lost_since = lost_since or time.monotonic()
        if client.status in ("closed", "closing") or time.monotonic() - lost_since > SILENCE:
            raise _gone(address, None)


def _gone(address: str, error: BaseException | None) -> MthpError:
    why = f": {str(error).splitlines()[0]}" if error is not None and str(error) else ""
    return MthpError(f"the Dask scheduler at {address} went away{why}", help=_GO_ON)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep distributed from logging tracebacks of errors that are reported in one line here."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _let_go(client: Any) -> None:
    """Close the client in any state of the scheduler."""
    with contextlib.suppress(Exception):
        client.close(timeout=1)


def _imported(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnsupportedError(f"{module} cannot be imported: {error}", help=f"pip install 'mthp[{extra}]'") from error
