"""What ends the command line before a command begins."""

from __future__ import annotations

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
