"""Trimming of one target: pages of zeroes in large folios are given back."""

from __future__ import annotations

from mthp.daemon.environment import Environment
from mthp.engine.trim import TrimOptions, trim_space
from mthp.errors import MthpError, TargetVanishedError
from mthp.naming import ProcessFacts


def give_back(environment: Environment, facts: ProcessFacts, share: float) -> tuple[int, int | None]:
    """Trim folios of which `share` is zeroes, and write an event.

    Returns:
        The bytes that were given back, and the bytes of zeroes that were found and remain; None if the trim failed.

    Raises:
        TargetVanishedError: the process is gone.
    """
    try:
        with environment.opened(facts.pid) as space:
            report = trim_space(space, TrimOptions(zero=share), stop=environment.stopping)
    except TargetVanishedError:
        raise
    except MthpError as error:
        environment.event("trim_failed", pid=facts.pid, comm=facts.comm, reason=error.message)
        return 0, None
    if report.plan.folios:
        environment.event(
            "trimmed",
            pid=facts.pid,
            comm=facts.comm,
            folios=report.trimmed,
            failed=report.failed_by_result,
            trimmed_bytes=report.given_back_bytes,
        )
    return report.given_back_bytes, max(0, report.plan.zero_bytes - report.given_back_bytes)
