"""What ends the command line before a command begins."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from mthp import cli
from mthp.cli.signals import EndedBySignalError


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (EndedBySignalError(15), 143)])
def test_a_signal_before_the_command_has_the_exit_code_of_a_shell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int
) -> None:
    def interrupted(arguments: list[str]) -> int:
        raise error

    monkeypatch.setattr(cli, "_run", interrupted)
    assert cli.main(["inspect", "self", "--json"]) == code
    captured = capsys.readouterr()
    assert "interrupted" in captured.err
    assert f'"exit_code": {code}' in captured.out


def test_a_signal_where_the_reader_of_the_output_is_gone() -> None:
    program = (
        "import os, signal, sys\n"
        "from mthp import cli\n"
        "cli._run = lambda arguments: os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.exit(cli.main(['inspect', 'self', '--json']))\n"
    )
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run([sys.executable, "-c", program], stdout=writer, stderr=-1, text=True, check=False)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, "mthp: interrupted\n")
