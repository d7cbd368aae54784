"""Output files: exactly the name that was given, whole or not at all, and nothing that a link points to."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mthp import files
from mthp.bounded import named
from mthp.errors import MthpError, UsageError
from mthp.files import NewFile, check_output, creating, open_regular, write_whole


def names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


def write_and(path: Path, do: Callable[[], object], *, overwrite: bool = False) -> None:
    """Write `path`, and `do` something before it has its name."""
    with creating(path, overwrite=overwrite) as file:
        file.write(b"ours")
        do()


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.fixture(params=["tmpfile", "named", "no links"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Files without a name, and the ways of file systems that have none, or no hard links either."""
    real = os.open

    def refusing(path: str, flags: int, *rest: int, **more: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(95, "not supported")
        return real(path, flags, *rest, **more)

    def no_links(*_: object, **__: object) -> None:
        raise OSError(1, "not permitted")

    if request.param != "tmpfile":
        monkeypatch.setattr(os, "open", refusing)
    if request.param == "no links":
        monkeypatch.setattr(os, "link", no_links)
    return str(request.param)


@pytest.mark.usefixtures("way")
class TestAppearing:
    def test_whole_at_the_end(self, tmp_path: Path) -> None:
        with creating(tmp_path / "new") as file:
            file.write(b"some")
            assert not (tmp_path / "new").exists()
        assert (tmp_path / "new").read_bytes() == b"some"
        assert names(tmp_path) == ["new"]

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_not_at_all_after_an_error(self, tmp_path: Path, overwrite: bool) -> None:
        old = tmp_path / "file"
        if overwrite:
            old.write_text("old")
        with pytest.raises(KeyboardInterrupt):
            write_and(old, interrupt, overwrite=overwrite)
        assert names(tmp_path) == (["file"] if overwrite else [])
        assert not overwrite or old.read_text() == "old"

    def test_a_name_taken_meanwhile_is_left_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        with pytest.raises(UsageError, match="exists already"):
            write_and(path, lambda: path.write_text("theirs"))
        assert path.read_text() == "theirs"
        assert names(tmp_path) == ["file"]

    @pytest.mark.parametrize("target", ["precious", "nowhere"])
    def test_a_planted_link_is_not_followed(self, tmp_path: Path, target: str) -> None:
        precious, link = tmp_path / "precious", tmp_path / "out"
        precious.write_text("precious")
        link.symlink_to(tmp_path / target)
        with pytest.raises(UsageError, match="exists already"):
            check_output(link, overwrite=False)
        with pytest.raises(UsageError, match="exists already"):
            write_whole(link, b"ours")
        assert link.is_symlink()
        write_whole(link, b"ours", overwrite=True)
        assert not link.is_symlink()
        assert link.read_bytes() == b"ours"
        assert precious.read_text() == "precious"
        assert not (tmp_path / "nowhere").exists()

    def test_a_link_planted_meanwhile_is_not_followed(self, tmp_path: Path) -> None:
        precious, path = tmp_path / "precious", tmp_path / "out"
        precious.write_text("precious")
        write_and(path, lambda: path.symlink_to(precious), overwrite=True)
        assert (precious.read_text(), path.read_bytes(), path.is_symlink()) == ("precious", b"ours", False)

    @pytest.mark.parametrize("overwrite", [False, True])
    @pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["directory", "fifo"])
    def test_special_files_are_refused(self, tmp_path: Path, make: Callable[[Path], None], overwrite: bool) -> None:
        make(tmp_path / "special")
        with pytest.raises(UsageError, match="not a regular file"):
            check_output(tmp_path / "special", overwrite=overwrite)
        assert names(tmp_path) == ["special"]

    @pytest.mark.parametrize("name", ["", ".", "..", "no/such/file", "x" * 300, "nul\0", "directory/"])
    def test_names_that_cannot_be(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(UsageError):
            check_output(f"{tmp_path}/{name}" if name else "", overwrite=False)
        assert names(tmp_path) == []

    def test_modes(self, tmp_path: Path) -> None:
        old = os.umask(0o027)
        try:
            write_whole(tmp_path / "report", b"", mode=files.PUBLIC)
            write_whole(tmp_path / "snapshot", b"", mode=files.PRIVATE)
            (tmp_path / "hidden").touch(0o600)
            write_whole(tmp_path / "hidden", b"", mode=files.PUBLIC, overwrite=True)
            (tmp_path / "open").touch(0o666)
            write_whole(tmp_path / "open", b"", mode=files.PRIVATE, overwrite=True)
        finally:
            os.umask(old)
        modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
        assert modes == {"report": 0o640, "snapshot": 0o600, "hidden": 0o600, "open": 0o600}

    def test_written_on_after_it_has_its_name(self, tmp_path: Path) -> None:
        with NewFile(tmp_path / "stream") as new:
            new.raw.write(b"one")
            new.publish()
            assert (tmp_path / "stream").read_bytes() == b"one"
            new.raw.write(b"two")
        assert (tmp_path / "stream").read_bytes() == b"onetwo"

    def test_a_file_that_grows_too_large_leaves_nothing(self, tmp_path: Path) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            with pytest.raises(MthpError, match="File too large"):
                write_whole(tmp_path / "large", bytes(8192))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, before)
        assert names(tmp_path) == []


def test_kill_9_leaves_nothing(tmp_path: Path) -> None:
    code = f"""
from mthp.files import creating
import sys, time
with creating({str(tmp_path / "out")!r}) as file:
    file.write(bytes(100000))
    file.flush()
    print(flush=True)
    time.sleep(100)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.kill()
    assert names(tmp_path) == []


@pytest.mark.parametrize("message", ["d is not a file", "d: damaged", "damaged"])
def test_a_message_has_the_name_of_its_file_once(message: str) -> None:
    with pytest.raises(UsageError) as caught, named("d"):
        raise UsageError(message)
    assert caught.value.message in ("d is not a file", "d: damaged")


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    begun = time.monotonic()
    with pytest.raises(UsageError, match="not a regular file"):
        open_regular(tmp_path / "pipe")
    assert files.begins(tmp_path / "pipe", 4) == b""
    assert time.monotonic() - begun < 60
