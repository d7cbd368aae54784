"""Many snapshots and recordings by many settings: the figures of each, in one table.

One input is one task: it is opened once, and taken through all settings (:func:`mthp.lab.evaluate.evaluate`). Tasks
run in processes of this machine (joblib), or on a cluster (Dask distributed), and return the bytes of a small Arrow
table. Only the main process writes. The table of a task is kept in a directory beside the result, so that an
interrupted sweep can go on. When all tasks are done the parts become one Parquet file. Its contents do not depend on
where or in which order the tasks ran. An input that cannot be read is reported, and the others go on.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mthp import __version__, abilities
from mthp.errors import MthpError, UsageError
from mthp.files import PUBLIC, check_output, creating
from mthp.lab.evaluate import evaluate
from mthp.lab.figures import METRICS, Row
from mthp.lab.grid import Grid
from mthp.lab.heated import accesses_to_count
from mthp.lab.partsdirectory import PartsDirectory
from mthp.lab.replay import misses, walks_at
from mthp.lab.tlb import Processor
from mthp.measuring import out_of_reach_bytes
from mthp.progress import Progress
from mthp.snapshot import Recording
from mthp.snapshot.load import load
from mthp.snapshot.stream import is_recording
from mthp.snapshot.table import pyarrow
from mthp.tabular import Tabular

PARTS_SUFFIX = ".parts"


@dataclass(frozen=True, slots=True)
class Task:
    """One input with its settings.

    Attributes:
        path: absolute path of the file, which must be valid where the task runs.
        name: name of the input in the table.
        grid: the settings.
    """

    path: str
    name: str
    grid: Grid


@dataclass(frozen=True, slots=True)
class Done:
    """The result of a task.

    Attributes:
        name: name of the input.
        table: an Arrow IPC file of its rows; ``b""`` if it failed.
        error: why it failed; ``""`` if it did not.
    """

    name: str
    table: bytes
    error: str = ""


Runner = Callable[[Sequence[Task]], Generator[Done, None, None]]
"""Runs tasks, and yields their results in any order."""


@dataclass
class SweepReport(Tabular):
    """The report of a sweep.

    Attributes:
        path: path of the result; ``""`` if there is none yet.
        inputs: number of inputs.
        settings: number of settings for each.
        resumed: inputs that an earlier run had done.
        done: inputs that are done, including `resumed`.
        rows: rows of the result.
        failed: inputs that failed, by name, with the reason.
        interrupted: the caller stopped it before all were done.
    """

    path: str
    inputs: int
    settings: int
    resumed: int = 0
    done: int = 0
    rows: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False

    def table_columns(self) -> dict[str, Any]:
        """Return the columns of the result's file; none if there is no result yet."""
        if not self.path:
            return {}
        table = pyarrow("pyarrow.parquet").read_table(self.path)
        return dict(zip(table.column_names, table.columns, strict=True))


def sweep(
    inputs: Sequence[tuple[str, Path]],
    grid: Grid,
    output: str | os.PathLike[str],
    runner: Runner,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> SweepReport:
    """Take all `inputs` through all settings of `grid`, and write the figures to the Parquet file `output`.

    Args:
        inputs: names and files, as :func:`inputs_in` returns them.
        runner: :func:`mthp.lab.runners.local` or :func:`mthp.lab.runners.dask`.
        stop: called after every input; finished inputs are kept for the next run.

    Raises:
        UsageError: the file exists or cannot be created.
        MthpError: the runner failed; finished inputs are kept for the next run.
        UnsupportedError: pyarrow is missing.
    """
    # A missing package and an existing file are reported now, not after hours of tasks.
    pyarrow()
    check_output(output, overwrite=overwrite)
    target = Path(output)
    keys = {name: _key(name, path, grid) for name, path in inputs}
    report = SweepReport("", len(inputs), len(grid.settings()))
    with PartsDirectory(target.with_name(target.name + PARTS_SUFFIX)) as parts:
        todo = [Task(str(path.resolve()), name, grid) for name, path in inputs if not _done(parts, keys[name])]
        report.resumed = report.done = len(inputs) - len(todo)
        for number, result in enumerate(_results(runner, todo), 1):
            if result.error:
                report.failed[result.name] = result.error
            else:
                parts.keep(keys[result.name], result.table)
                report.done += 1
            if progress is not None:
                progress(report.resumed + number, len(inputs))
            if stop():
                report.interrupted = number < len(todo)
                break
        if report.interrupted:
            return report
        report.failed = dict(sorted(report.failed.items()))
        # By the name of the input, as `inputs` is sorted.
        report.rows = _merge(parts, [key for key in keys.values() if key in parts], target, overwrite=overwrite)
        report.path = os.fspath(output)
        parts.remove()
    return report


def _results(runner: Runner, todo: Sequence[Task]) -> Iterator[Done]:
    # No runner is started for nothing.
    if todo:
        # Closing ends the workers, also after an error.
        with contextlib.closing(runner(todo)) as results:
            yield from results


def _done(parts: PartsDirectory, key: str) -> bool:
    """Return whether an earlier run did the task."""
    # A part that a power failure cut short is done again.
    if key not in parts:
        return False
    try:
        _opened(parts, key)
    except (OSError, pyarrow().ArrowException):
        parts.drop(key)
        return False
    return True


def inputs_in(directory: str | os.PathLike[str]) -> list[tuple[str, Path]]:
    """Return the files in `directory` and below, by relative name, without hidden ones and those that a sweep writes.

    Raises:
        UsageError: `directory` is not a directory, or has no files.
    """
    root = Path(directory)
    if not root.is_dir():
        raise UsageError(f"{root} is not a directory", help="name a directory of snapshots and recordings")
    found = []
    for folder, folders, files in os.walk(root):
        # In place, which os.walk() reads: it does not enter the others.
        folders[:] = sorted(each for each in folders if not each.startswith(".") and not each.endswith(PARTS_SUFFIX))
        found += [Path(folder) / file for file in files if not file.startswith(".")]
    if not found:
        raise UsageError(f"nothing is in {root}", help="make inputs with mthp snapshot or mthp record")
    return sorted((str(path.relative_to(root)), path) for path in found)


def measure(task: Task) -> Done:
    """Do one task. An error of its input is in the result."""
    try:
        return Done(task.name, _packed(list(_rows(task))))
    except MthpError as error:
        # The result has the name of the input. The path that errors begin with may be another machine's.
        return Done(task.name, b"", error.message.removeprefix(f"{task.path}: "))


def _rows(task: Task) -> Iterator[Row]:
    grid, settings = task.grid, task.grid.settings()
    for step, at, space in _spaces(task):
        with space:
            label, service, heat = space.label, abilities.service(space), abilities.heat_of(space)
            reach, outcomes = out_of_reach_bytes(space), evaluate(space, settings, scans=grid.scans, heat=heat)
            walks = None
            if grid.processor is not None and (accesses := accesses_to_count(space, heat)) is not None:
                walks = misses(space, settings, accesses, Processor.named(grid.processor), grid.scans)
        for number, outcome in enumerate(outcomes):
            head = {
                "input": task.name,
                "target": label,
                "service": service,
                "step": step,
                "seconds": at,
                "setting": number,
                "out_of_reach_bytes": reach,
            }
            last = len(outcome.scans) - 1
            for row in outcome.rows():
                if grid.processor is not None:
                    row["tlb_misses"] = (
                        None if walks is None else walks_at(row["scan"], last, walks[0], walks[1][number])
                    )
                yield head | row


def _spaces(task: Task) -> Iterator[tuple[int, float, Any]]:
    """Yield the address spaces of an input, with step and seconds."""
    if not is_recording(task.path):
        yield 0, 0.0, load(task.path)
        return
    recording = Recording(task.path)
    if task.grid.steps == "all":
        for space in recording.walk():
            yield space.step.number, space.step.seconds, space
    else:
        last = recording.space()
        yield last.step.number, last.step.seconds, last


def _packed(rows: Sequence[Row]) -> bytes:
    """Return rows as the bytes of an Arrow IPC file; shares and seconds are doubles, counts are int64."""
    arrow = pyarrow()
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    schema = arrow.schema([(name, _arrow_type(name, values[0])) for name, values in columns.items()])
    table = arrow.table([arrow.array(columns[field.name], field.type) for field in schema], schema=schema)
    sink = io.BytesIO()
    with arrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _arrow_type(name: str, value: object) -> Any:
    arrow = pyarrow()
    if isinstance(value, str):
        return arrow.string()
    unit = METRICS[name].unit if name in METRICS else "share" if name.startswith("order_share_") else ""
    if unit in ("share", "seconds", "entries") or name == "tlb_reach_bytes":
        return arrow.float64()
    # Figures that an input does not have are null, in a column of the same type.
    return arrow.int64() if isinstance(value, int) or unit else arrow.float64()


def _key(name: str, path: Path, grid: Grid) -> str:
    """Return the name of the result of a present input, the grid, and this version."""
    try:
        there = path.stat()
        state = (there.st_size, there.st_mtime_ns)
    except OSError:
        state = (0, 0)
    # Another version may compute other figures, and a changed file has another size or time.
    return hashlib.sha256(repr((__version__, name, state, grid.text())).encode()).hexdigest()[:32]


def _merge(parts: PartsDirectory, keys: Sequence[str], target: Path, *, overwrite: bool) -> int:
    """Write the tables called `keys`, in that order, to `target`; return the number of rows."""
    arrow, parquet = pyarrow(), pyarrow("pyarrow.parquet")
    schema = arrow.unify_schemas([_opened(parts, key).schema for key in keys]) if keys else arrow.schema([])
    rows = 0
    with (
        creating(target, overwrite=overwrite, mode=PUBLIC) as file,
        parquet.ParquetWriter(file, schema, compression="zstd") as writer,
    ):
        # A row group for 256 inputs: a sweep of thousands would make one table larger than memory.
        for group in range(0, len(keys), 256):
            tables = [_opened(parts, key).read_all() for key in keys[group : group + 256]]
            table = arrow.concat_tables([schema.empty_table(), *tables], promote_options="default")
            writer.write_table(table.select(schema.names))
            rows += table.num_rows
    return rows


def _opened(parts: PartsDirectory, key: str) -> Any:
    return pyarrow("pyarrow.ipc").open_file(io.BytesIO(parts.read(key)))
