"""The command line where only mthp itself is installed: what works, and which extra the rest asks for."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from e2e.helpers import mthp, mthp_json

EXTRAS = ("pyarrow", "joblib", "distributed", "prometheus_client", "textual")
_BARE = f"import json, sys; sys.modules.update(dict.fromkeys({EXTRAS})); from mthp.cli import main; "
WITHOUT = [sys.executable, "-c", f"{_BARE} sys.exit(main())"]
"""The command line, for which importing a package of an extra fails as if it were not there."""

IN_TURN = [sys.executable, "-c", f"{_BARE} print(*(main(command) for command in json.loads(sys.argv[1])))"]
"""The same for several commands: their exit codes are the last line."""

SCENARIO = """
duration = "1s"
[machine]
memory = "64M"
[[process]]
workload = "service"
core = "4M"
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "one.parquet").write_bytes(b"PAR1")
    (tmp_path / "grid.toml").write_text('policies = ["rfc"]\n')
    (tmp_path / "scenario.toml").write_text(SCENARIO)
    return tmp_path


@pytest.mark.parametrize("command", ["inspect", "plan", "compare"])
def test_what_looks_at_a_process_works(command: str) -> None:
    assert mthp_json(command, "self", program=WITHOUT)["schema"] == f"mthp.{command}/1"


def test_what_else_works(place: Path) -> None:
    assert mthp("--help", program=WITHOUT).returncode == 0
    assert mthp("doctor", program=WITHOUT).returncode in {0, 1, 3}
    assert mthp("collapse", "self", "--dry-run", program=WITHOUT).returncode in {0, 3}
    assert mthp("simulate", place / "scenario.toml", program=WITHOUT).returncode == 0


def test_a_process_is_recorded_and_reported_on(tmp_path: Path) -> None:
    snapshot, recording = str(tmp_path / "s.mthp"), str(tmp_path / "r.mthp")
    record = ["record", "self", "--every", "10ms", "--for", "20ms", "-o", recording]
    for arguments in (["snapshot", "self", "-o", snapshot], record):
        assert mthp(*arguments, program=WITHOUT).returncode == 0
    commands = []
    for number, target in enumerate(["self", snapshot, recording]):
        commands.append(["report", target, "-o", str(tmp_path / f"{number}.html")])
        commands += [[command, target] for command in ("inspect", "plan", "compare", "explain")]
    # One interpreter for all of them: most of a command's time is the start of one.
    done = mthp(json.dumps(commands), program=IN_TURN)
    assert done.stdout.splitlines()[-1].split() == ["0"] * len(commands), done.stderr


def test_several_processes_are_recorded_in_plain_files(tmp_path: Path) -> None:
    targets = [str(os.getpid()), "self"]
    assert mthp("record", *targets, "--for", "10ms", "-o", tmp_path / "all", program=WITHOUT).returncode == 0
    assert [path.suffix for path in (tmp_path / "all").iterdir()] == 2 * [".mthp"]


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["snapshot", "self", "-o", "{place}/out"], "snapshot"),
        (["record", "self", "-o", "{place}/out", "--for", "10ms"], "snapshot"),
        (["inspect", "{place}/in/one.parquet"], "snapshot"),
        (["simulate", "{place}/scenario.toml", "-o", "{place}/out"], "snapshot"),
        (["report", "{place}/in/one.parquet", "-o", "{place}/out"], "snapshot"),
        (["sweep", "{place}/in", "--grid", "{place}/grid.toml", "-o", "{place}/out"], "lab"),
        pytest.param(
            ["daemon", "--comm", "nobody", "--metrics", "9464", "--run-dir", "{place}/run"],
            "daemon",
            marks=pytest.mark.requires("root"),
        ),
    ],
)
def test_the_rest_says_what_to_install(place: Path, arguments: list[str], extra: str) -> None:
    done = mthp(*(argument.format(place=place) for argument in arguments), program=WITHOUT)
    assert done.returncode == 3, done.stderr
    assert f"pip install 'mthp[{extra}]'" in done.stderr
    assert not (place / "out").exists()
