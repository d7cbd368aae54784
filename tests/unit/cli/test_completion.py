"""Shell completion: what mthp proposes, and where the script is put."""

from __future__ import annotations

import os
import pwd
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from click.shell_completion import CompletionItem, ShellComplete

from mthp.cli import COMMANDS, COMPLETE_VARIABLE, _mthp, completing, completion_command, main
from mthp.engine.policy_lookup import policy_names
from mthp.naming import KINDS, ProcessFacts
from waiting import PATIENCE


def proposed(line: str) -> list[CompletionItem[str]]:
    """Return the completions of the last word of a command line."""
    *words, incomplete = line.split(" ")
    return ShellComplete(_mthp, {}, "mthp", COMPLETE_VARIABLE).get_completions(words, incomplete)


def values(line: str) -> list[str]:
    return [item.value for item in proposed(line) if item.type == "plain"]


@pytest.fixture
def named() -> str:
    """The name that the kernel has for this process."""
    return Path("/proc/self/comm").read_text().rstrip("\n")


def test_commands_are_proposed() -> None:
    assert set(values("")) == COMMANDS.keys()
    assert values("comp") == ["compare", "completion"]


@pytest.mark.parametrize(
    "command", ["inspect", "plan", "collapse", "trim", "record", "report", "top", "daemon", "snapshot"]
)
def test_a_target_is_a_pid_with_its_name_a_process_name_a_word_or_a_file(command: str, named: str) -> None:
    pid = str(os.getpid())
    found = {item.value: item.help for item in proposed(f"{command} {pid}") if item.type == "plain"}
    assert found[pid] == named
    assert proposed(f"{command} ")[0].type == "file"
    assert "self" in values(f"{command} sel")
    assert named in values(f"{command} {named[:2]}")


def test_kernel_threads_are_not_proposed() -> None:
    assert "2" not in values("inspect 2") or Path("/proc/2/statm").read_text()[:2] != "0 "


@pytest.mark.parametrize("comm", ["$(reboot)", "a b", "`x`", "-rf", "a\nb", "a;b", "\x1b[31m"])
def test_a_name_that_a_shell_could_run_is_not_proposed(comm: str) -> None:
    set_name = f"import time; open('/proc/self/comm', 'w').write({comm!r}); print(flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", set_name], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        items = [item for item in proposed("inspect ") + proposed(f"inspect {comm[:1]}") if item.type == "plain"]
        assert comm not in [item.value for item in items]
        assert all("\n" not in (item.help or "") and "\x1b" not in (item.help or "") for item in items)
    finally:
        process.kill()
        process.communicate()


def test_kinds_of_names_are_proposed_with_the_names_there_are(named: str) -> None:
    assert {"comm:", "cgroup:", "container:"} <= set(values("inspect c"))
    # With a single one the shell would put a space behind the colon.
    assert f"comm:{named}" in values("inspect com")
    assert f"comm:{named}" in values(f"inspect comm:{named[:2]}")
    assert all(each.startswith(f"comm:{named[:2]}") for each in values(f"inspect comm:{named[:2]}"))
    assert f"user:{pwd.getpwuid(os.getuid()).pw_name}" in values("trim user:")
    assert f"exe:{Path('/proc/self/exe').resolve()}" in values("record exe:/")
    # Files would only disturb here.
    assert [item for item in proposed("inspect exe:/") if item.type != "plain"] == []


class KnownProcesses:
    """Two processes: one of a pod, one of a unit."""

    def pids(self) -> list[int]:
        return [7, 8]

    def read(self, pid: int, properties: Iterable[str]) -> ProcessFacts:
        if pid == 8:
            return ProcessFacts(pid, 1, cgroup="/user@0.service/db.service")
        cgroup = f"/kubepods.slice/pod1.slice/cri-containerd-{CONTAINER}.scope"
        return ProcessFacts(pid, 1, cgroup=cgroup, pod="shop/redis-0", container_name="$(reboot)")


CONTAINER = 64 * "a"


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("pod:", ["pod:shop/redis-0"]),
        ("unit:", [f"unit:cri-containerd-{CONTAINER}.scope", "unit:db.service", "unit:user@0.service"]),
        ("unit:d", ["unit:db.service"]),
        ("container:", [f"container:{CONTAINER[:12]}"]),
        ("cgroup:/u", ["cgroup:/user@0.service", "cgroup:/user@0.service/db.service"]),
    ],
)
def test_pods_units_containers_and_groups_are_proposed(
    typed: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mthp.linux.facts.FactsReader", KnownProcesses)
    assert values(f"inspect {typed}") == expected


def test_nothing_is_proposed_where_nothing_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mthp.linux.facts.PROC", "/nonexistent")
    assert [values(f"inspect {kind}:") for kind in KINDS] == [[] for _ in KINDS]


def test_the_shell_does_not_wait_for_many_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completing, "LONGEST_SECONDS", 0.0)
    assert values("inspect comm:") == []


def test_policies_are_proposed() -> None:
    assert values("plan 1 --policy ") == policy_names()
    assert values("daemon --policy main") == ["mainline"]
    assert "rfc,mainline" in values("simulate x.toml --policies rfc,main")
    assert "rfc,mainline" in values("compare 1 --policies rfc,main")


@pytest.mark.parametrize("line", ["sweep ", "sweep --grid ", "daemon --config ", "simulate ", "report a --after "])
def test_files_are_left_to_the_shell(line: str) -> None:
    assert "file" in {item.type for item in proposed(line)}


def test_other_values_are_proposed() -> None:
    assert "madvise" in values("collapse 1 --mechanism m")
    assert values("completion ") == ["bash", "zsh", "fish"]


@pytest.mark.parametrize("shell", list(completion_command.FILES))
@pytest.mark.parametrize("user", [0, 1000])
def test_the_script_is_put_where_the_shell_finds_it(
    shell: str, user: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    path = completion_command.destination(shell)
    assert path.is_relative_to("/usr/local/share" if user == 0 else tmp_path)
    if user:
        # The second time it replaces the first.
        for _ in range(2):
            assert main(["completion", shell, "--install"]) == 0
        assert path.read_text() == script
        printed = capsys.readouterr().out
        assert f"installed {path}" in printed
        assert ("fpath=" in printed) == (shell == "zsh")


def test_a_directory_that_cannot_be_made_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    assert main(["completion", "fish", "--install"]) == 1
    assert "cannot be created: Not a directory" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        # As bash takes a command line apart, of which the last word is completed.
        ("plan self --policy mainl", "mainline"),
        ("inspect comm : {comm}", "{comm}"),
        ("inspect comm :", "{comm}"),
        ("inspect comm:{comm}", "comm:{comm}"),
        ("inspect 1 exe : {exe}", "{exe}"),
    ],
)
def test_bash_completes_with_the_script(
    words: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], named: str
) -> None:
    words, expected = (each.format(comm=named, exe=Path("/proc/self/exe").resolve()) for each in (words, expected))
    assert main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    (tmp_path / "mthp").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m mthp "$@"\n')
    (tmp_path / "mthp").chmod(0o755)
    typed = (
        f"source ./script; COMP_WORDS=(mthp {words}); COMP_CWORD={len(words.split())};"
        " _mthp_completion mthp; printf '%s\\n' ${COMPREPLY[@]}"
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", typed],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert expected in done.stdout.split(), done.stderr


def test_commands_are_imported_with_a_click_whose_classes_are_not_generic() -> None:
    old = "import click.shell_completion as s; s.CompletionItem = type('CompletionItem', (), {})"
    load = "import importlib, mthp.cli as c; [importlib.import_module(f'mthp.cli.{n}_command') for n in c.COMMANDS]"
    subprocess.run([sys.executable, "-c", f"{old}; {load}"], check=True, timeout=PATIENCE)
