"""A machine under QEMU that boots a kernel, runs one job, brings its files back, and ends in time.

The host's processor runs it if KVM works, which a short boot tries; otherwise QEMU translates (TCG). A boot takes
seconds either way. The guest has neither network nor disk. Its process always ends with the ``with`` block.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from vm.apt import LabError, cache_directory
from vm.initramfs import CHANNEL_PORT, FILES_PORT, build, compiled_targets, job_archive
from vm.kernels import Kernel
from vm.tools import need
from vm.world import project, world

QUIET = "quiet loglevel=3 panic=-1 random.trust_cpu=on"

_TCG = "tcg,thread=multi"

PROBE_SECONDS = 20
"""Seconds in which a guest must show that KVM works; it takes one or two."""

Listen = Callable[[str], None]
"""Called with every line that the job writes to ``$CHANNEL``."""


@dataclass(frozen=True)
class Job:
    """The work of a guest.

    Attributes:
        script: a shell script; files that it leaves in ``/out`` are copied back.
        files: files in its directory, by name.
        with_python: whether the guest has the `world`, and the project at ``/mthp``.
        seconds: its time limit, the boot included.
        memory_mb: of the machine, in MiB.
        cpus: of the machine.
        parameters: further words for the kernel's command line.
        silence: seconds without output on console or channel, after which the guest counts as stuck.
        accelerator: ``kvm`` or ``tcg``; the better one that works, if empty.
    """

    script: str
    files: dict[str, bytes] = field(default_factory=dict)
    with_python: bool = False
    seconds: float = 120
    memory_mb: int = 1024
    cpus: int = 1
    parameters: str = ""
    silence: float = float("inf")
    accelerator: str = ""


@dataclass(frozen=True)
class Outcome:
    """The result of a job.

    Attributes:
        exit_code: of the script; None if the guest did not finish it.
        console: its output, with the kernel's messages.
        files: the files in ``/out``, by path.
        seconds: its duration, with the boot.
        timed_out: whether it was ended because its time was over, or because it was silent for too long.
    """

    exit_code: int | None
    console: str
    files: dict[str, bytes]
    seconds: float
    timed_out: bool


class Guest:
    """A guest that is booting or running; a context manager, which ends it.

    Args:
        kernel: the kernel to boot.
        job: the work.
        echo: whether to print the console.
    """

    def __init__(self, kernel: Kernel, job: Job, *, echo: bool = False) -> None:
        self.kernel = kernel
        self._job = job
        self._echo = echo
        self._directory = Path(tempfile.mkdtemp(prefix="mthp-vm-"))
        self._console = bytearray()
        self._began = time.monotonic()
        self._channel: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Guest:
        try:
            self._process = self._start()
        except BaseException:
            shutil.rmtree(self._directory)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._channel:
            self._channel.close()
        self._end()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _start(self) -> subprocess.Popen[bytes]:
        job, platform = self._job, self.kernel.platform
        need(platform.qemu[0], [platform.emulator])
        archives, files = [], {f"job/{name}": data for name, data in job.files.items()}
        if job.with_python:
            archives = [world(platform)]
            files |= {f"mthp/{name}": data for name, data in project().items()}
            files["usr/lib/python3/dist-packages/mthp.pth"] = b"/mthp/src\n"  # as an editable install has it
            files |= {f"programs/{name}": data for name, data in compiled_targets(platform).items()}
        archives += [build(self.kernel), job_archive(job.script, files)]
        (self._directory / "initrd").write_bytes(b"".join(archives))
        (self._directory / "files").touch()
        command = self._command()
        self._began = time.monotonic()  # without the time to fetch, build and probe
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, process_group=0
        )

    def _command(self) -> list[str]:
        job, platform, directory = self._job, self.kernel.platform, self._directory
        accelerator = job.accelerator or ("kvm" if kvm_works(self.kernel) else "tcg")
        machine = ["-cpu", "host", "-accel", "kvm"] if accelerator == "kvm" else ["-cpu", platform.cpu, "-accel", _TCG]
        return [
            "setpriv", "--pdeathsig", "KILL", "--",  # or a guest would outlive a lab that was killed
            *platform.qemu, *machine,
            "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio",
            "-m", str(job.memory_mb), "-smp", str(job.cpus),
            "-kernel", str(self.kernel.image), "-initrd", str(directory / "initrd"),
            "-append", f"console={platform.console} {QUIET} {job.parameters}",
            "-device", "virtio-serial-pci", "-device", "virtio-rng-pci",
            "-chardev", f"file,id=files,path={directory / 'files'}",
            "-device", f"virtserialport,chardev=files,name={FILES_PORT}",
            "-chardev", f"socket,id=channel,path={directory / 'channel'},server=on,wait=off",
            "-device", f"virtserialport,chardev=channel,name={CHANNEL_PORT}",
        ]  # fmt: skip

    @property
    def channel(self) -> socket.socket:
        """Return the host's end of the port that the job has as ``$CHANNEL``.

        Raises:
            LabError: QEMU did not start.
        """
        if self._channel is None:
            self._channel = socket.socket(socket.AF_UNIX)
            for _ in range(100):
                with contextlib.suppress(OSError):
                    self._channel.connect(str(self._directory / "channel"))
                    break
                self.drain()
                time.sleep(0.1)
            else:
                raise LabError(f"the guest does not come up: {self.console[-800:]}")
        return self._channel

    @property
    def console(self) -> str:
        """Return the output so far."""
        return self._console.decode(errors="replace").replace("\r", "")

    @property
    def remaining(self) -> float:
        """Return the seconds until its time is over."""
        return self._began + self._job.seconds - time.monotonic()

    def drain(self) -> None:
        """Read the output that the console has now."""
        self._follow(0, None)

    def wait(self, listen: Listen | None = None) -> Outcome:
        """Wait for the end of the job or its time limit, and call `listen` with each line of the channel."""
        ended = self._follow(self._job.silence, listen)
        self._end()
        exit_code, files = _unpacked((self._directory / "files").read_bytes())
        return Outcome(exit_code, self.console, files, time.monotonic() - self._began, not ended)

    def _follow(self, patience: float, listen: Listen | None) -> bool:
        """Read the console, and the channel if there is a listener.

        Returns:
            Whether both are closed; otherwise the time is over, or no byte came for `patience` seconds.
        """
        assert self._process is not None
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ, self._keep)
            if listen:
                selector.register(self.channel, selectors.EVENT_READ, _by_line(listen))
            while selector.get_map():
                ready = selector.select(min(self.remaining, patience)) if self.remaining > 0 else []
                if not ready:
                    return False
                for key, _ in ready:
                    if chunk := os.read(key.fd, 1 << 16):
                        key.data(chunk)
                    else:
                        selector.unregister(key.fileobj)
        return True

    def _keep(self, chunk: bytes) -> None:
        self._console += chunk
        if self._echo:
            sys.stdout.write(chunk.decode(errors="replace"))
            sys.stdout.flush()

    def _end(self) -> None:
        process = self._process
        if process is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0 if self.remaining <= 0 else 2)  # it has switched itself off, or will not
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout:
            process.stdout.close()


def run(kernel: Kernel, job: Job, *, echo: bool = False, listen: Listen | None = None) -> Outcome:
    """Boot, run, and wait; call `listen` with each line that the job writes to ``$CHANNEL``."""
    with Guest(kernel, job, echo=echo) as guest:
        return guest.wait(listen)


@functools.cache
def kvm_works(kernel: Kernel) -> bool:
    """Return whether the host's processor runs a kernel."""
    same = kernel.platform.machine == os.uname().machine
    return same and os.access("/dev/kvm", os.R_OK | os.W_OK) and boots_in_kvm(kernel)


def boots_in_kvm(kernel: Kernel, boot: Callable[[Kernel, Job], Outcome] = run) -> bool:
    """Return whether a kernel comes up in KVM.

    /dev/kvm alone is not enough: the machine is often a guest itself, and may lack a feature that the kernel uses. So a
    short boot tries it, once for each kernel while the machine is up.
    """
    up = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    known = cache_directory() / "kvm" / f"{up}-{kernel.release}"
    if not known.exists():
        outcome = boot(kernel, Job("true", seconds=PROBE_SECONDS, memory_mb=512, accelerator="kvm"))
        known.parent.mkdir(parents=True, exist_ok=True)
        known.write_text("works" if outcome.exit_code == 0 else outcome.console[-4000:] or "says nothing")
    return known.read_text() == "works"


def _by_line(listen: Listen) -> Callable[[bytes], None]:
    """Collects chunks, and calls `listen` with whole lines."""
    kept = bytearray()

    def take(chunk: bytes) -> None:
        kept.extend(chunk)
        *lines, rest = kept.split(b"\n")
        kept[:] = rest
        for line in lines:
            listen(line.decode(errors="replace"))

    return take


def _unpacked(stream: bytes) -> tuple[int | None, dict[str, bytes]]:
    """Return the exit code and the files of a tar stream that may be cut off."""
    files: dict[str, bytes] = {}
    with contextlib.suppress(tarfile.TarError, EOFError), tarfile.open(fileobj=io.BytesIO(stream)) as archive:
        for member in archive:
            content = archive.extractfile(member)
            if content:
                files[member.name.removeprefix("./")] = content.read()
    code = files.pop(".exit-code", None)
    return (None if code is None else int(code)), files
