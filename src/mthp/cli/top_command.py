"""``mthp top [TARGET]``: a live table of processes by the gain of a collapse."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import click

from mthp.addrspace import AddressSpace
from mthp.cli.asking import ask_daemon
from mthp.cli.completing import complete_target
from mthp.cli.options import SHARE, made_of, plan_options
from mthp.engine.policy_lookup import policy_named
from mthp.engine.select import PlanOptions, base_rules
from mthp.errors import MthpError, UnsupportedError
from mthp.targets import open_target, pid_of, refuse_ancestor, resolve


@click.command("top")
@click.argument("target", required=False, shell_complete=complete_target)
@click.option(
    "--cpu",
    type=SHARE,
    default="10%",
    show_default=True,
    help="Share of one processor that reading processes may use.",
)
@plan_options
def command(target: str | None, cpu: float, **options: Any) -> int:
    """Show processes by the gain of a collapse, and keep the table up to date.

    With a TARGET (a PID, a name, a snapshot, a recording) show its mappings; keys step through a recording in time. The
    key ? lists the keys. A collapse begins after a confirmation, runs beside the screen, and can be stopped.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UnsupportedError("top needs a terminal", help="in scripts use: mthp inspect TARGET --json")
    try:
        from mthp.top.app import TopApp
    except ImportError as error:
        raise UnsupportedError(
            f"top needs Textual, which cannot be imported: {error}", help="pip install 'mthp[top]'"
        ) from error
    view = view_of(target, made_of(PlanOptions, options), cpu)
    app = TopApp(view)
    try:
        return app.run() or 0
    finally:
        # Also after an error, because a collapse is not broken off in the middle of a step.
        app.wait_for_collapse()
        view.source.close()


def view_of(target: str | None, options: PlanOptions, cpu: float) -> Any:
    """Return the view to show.

    Raises:
        MthpError: as :func:`mthp.targets.open_target`.
    """
    from mthp.top.mapped import Mapped
    from mthp.top.survey import Survey, View

    # A name of a process is its PID from here on.
    chosen = str(resolve("self" if target is None else target))
    with open_target(chosen) as space:
        geometry, title, switches = space.geometry, space.label, _switches(space)
        # Fail now, where the error is readable, and not on every row.
        base_rules(space, options)
        policy_named(options.policy)
    if target is None:
        survey = Survey(options, cpu)
        survey.start()
        return View("mthp top", survey, geometry, options, _opened_to_collapse, daemon_status, switches)
    pid = pid_of(chosen)
    steps = () if pid is not None else _steps(chosen)
    mapped = Mapped(
        lambda step: open_target(chosen, at=None if step is None else str(step)),
        options,
        cpu=cpu,
        steps=steps,
        live=pid is not None,
    )
    mapped.start()
    # Rows are mappings here, and their key is not a PID.
    opened = None if pid is None else lambda _address: _opened_to_collapse(pid)
    return View(title, mapped, geometry, options, opened, daemon_status, switches)


def _opened_to_collapse(pid: int) -> AddressSpace:
    refuse_ancestor(pid)
    return open_target(pid)


def _steps(path: str) -> tuple[float, ...]:
    """Return the seconds of each step if the file at `path` is a recording."""
    from mthp.snapshot.recording import Recording
    from mthp.snapshot.stream import is_recording

    return tuple(step.seconds for step in Recording(path).steps) if is_recording(path) else ()


def _switches(space: AddressSpace) -> str:
    """Return the kernel and its switches in one line, with equal switches together."""
    geometry, switches = space.geometry, space.switches
    by_word: dict[str, list[str]] = {}
    for order, word in sorted(switches.sizes.items(), reverse=True):
        by_word.setdefault(word, []).append(geometry.label(order))
    sizes = "; ".join(f"{word}: {' '.join(labels)}" for word, labels in by_word.items())
    return f"Linux {space.kernel}, enabled: {switches.enabled}; {sizes}"


def daemon_status() -> Mapping[str, Any] | None:
    """Return the status of this machine's daemon; None if it does not run, or refuses this user."""
    try:
        return ask_daemon("status", None)
    except MthpError:
        return None
