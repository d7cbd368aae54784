"""Shell completion: what mthp proposes, and where the script is put."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import CompletionItem, ShellComplete

from mthp.cli import COMMANDS, _mthp, completion_command, main
from mthp.engine.policy_lookup import policy_names
from waiting import PATIENCE


def proposed(line: str) -> list[CompletionItem[str]]:
    """Return the completions of the last word of a command line."""
    *words, incomplete = line.split(" ")
    return ShellComplete(_mthp, {}, "mthp", completion_command.VARIABLE).get_completions(words, incomplete)


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
def test_bash_completes_with_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    (tmp_path / "mthp").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m mthp "$@"\n')
    (tmp_path / "mthp").chmod(0o755)
    typed = (
        "source ./script; COMP_WORDS=(mthp plan self --policy mainl); COMP_CWORD=4;"
        " _mthp_completion mthp mainl --policy; printf '%s\\n' ${COMPREPLY[@]}"
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
    assert done.stdout.split() == ["mainline"], done.stderr


def test_commands_are_imported_with_a_click_whose_classes_are_not_generic() -> None:
    old = "import click.shell_completion as s; s.CompletionItem = type('CompletionItem', (), {})"
    load = "import importlib, mthp.cli as c; [importlib.import_module(f'mthp.cli.{n}_command') for n in c.COMMANDS]"
    subprocess.run([sys.executable, "-c", f"{old}; {load}"], check=True, timeout=PATIENCE)
