"""Fetch packages of the distribution, for any architecture, without changing the installed ones.

Each architecture has a directory with its own configuration, lists and status of apt. The sources are derived from the
machine's: the same archive and the same keys, other suites. So apt fetches, apt checks signatures and hashes, and no
address is in this file.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SUITES = ("bookworm", "bookworm-backports", "trixie", "trixie-backports", "unstable", "experimental")
"""Suites with kernels of many versions, from the oldest to the newest; backports keep older ones."""

FRESH_SECONDS = 24 * 3600
"""Seconds for which lists count as fresh."""

_SYSTEM = Path("/etc/apt")

_KEEP_BINARY_LISTS = ("-oDir::Cache::pkgcache=pkgcache.bin", "-oDir::Cache::srcpkgcache=srcpkgcache.bin")
"""Machines made of container images have apt parse all lists at every question, which takes it seconds. Their setting
is read after that of our file."""


class LabError(Exception):
    """The kernel lab cannot do this; the text says how to change that."""


class UnreachableError(LabError):
    """The archive does not answer, and nothing else that is fetched from it can be had either."""


def cache_directory() -> Path:
    """Return the directory of fetched and built files: ``$XDG_CACHE_HOME/mthp-vm``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mthp-vm"


@dataclass(frozen=True)
class Source:
    """An archive that the machine trusts: its address, and the option that names its keys, or nothing."""

    uri: str
    signed_by: str


def system_source() -> Source:
    """Return the archive of the distribution, from the configuration of the machine's apt.

    Raises:
        LabError: apt has none.
    """
    texts = [path.read_text() for path in _source_files() if path.exists()]
    for text in texts:
        for stanza in re.split(r"\n\s*\n", text):
            if (source := _deb822(stanza)) and "main" in stanza:
                return source
        for line in text.splitlines():
            if match := re.match(r"deb\s+(\[[^]]*\]\s+)?(\S+)\s+\S+\s+main", line):
                signed = re.search(r"signed-by=([^\]\s]+)", match[1] or "")
                return Source(match[2], signed[1] if signed else "")
    raise LabError("apt has no sources of a Debian archive; the lab fetches its kernels from there")


def _source_files() -> list[Path]:
    return [_SYSTEM / "sources.list.d/debian.sources", _SYSTEM / "sources.list"]


def _deb822(stanza: str) -> Source | None:
    """Return the archive in a stanza of a ``.sources`` file (sources.list(5))."""
    lines = [line for line in stanza.splitlines() if line and not line.startswith("#")]
    fields = dict(line.split(":", 1) for line in lines if ":" in line and not line[0].isspace())
    if "deb" not in fields.get("Types", "").split() or not fields.get("URIs"):
        return None
    return Source(fields["URIs"].split()[0], fields.get("Signed-By", "").strip())


class Apt:
    """An apt for one architecture.

    Args:
        architecture: Debian's word: amd64, arm64, ppc64el.
        suites: the suites to fetch from.
        root: its directory; one below the lab's cache, if not given.
        source: where it fetches from; what the system uses, if not given.
        pauses: seconds before each try to fetch the lists.
    """

    def __init__(
        self,
        architecture: str,
        suites: Sequence[str] = SUITES,
        root: Path | None = None,
        source: Source | None = None,
        pauses: Sequence[float] = (0, 5, 15),
    ) -> None:
        self._source = source
        self._pauses = pauses
        self.architecture = architecture
        self.suites = tuple(suites)
        self.root = root or cache_directory() / "apt" / f"{architecture}-{'-'.join(self.suites)}"

    def pool(self) -> Path:
        """Where downloaded packages are."""
        return self.root / "cache/archives"

    def refresh(self) -> None:
        """Fetch the lists of the suites, unless those here are fresh.

        Raises:
            LabError: no list can be fetched; UnreachableError if no server answers.
        """
        stamp = self.root / "refreshed"
        if stamp.exists() and time.time() - stamp.stat().st_mtime < FRESH_SECONDS:
            return
        self._configure()
        # A list that the archive is just replacing does not stop the others.
        for pause in self._pauses:
            time.sleep(pause)
            done = self._run(["apt-get", "update", "-oAcquire::Retries=0"], check=False)
            if self._has("*_Packages*"):
                break
            if not self._has("*Release"):
                raise UnreachableError(f"the archive cannot be reached: {done.stderr.strip()[-400:]}")
        else:
            raise LabError(f"no package lists can be had: {done.stderr.strip()[-400:]}")
        self.names.cache_clear()
        stamp.touch()

    def _has(self, pattern: str) -> bool:
        return any((self.root / "lists").glob(pattern))

    def _configure(self) -> None:
        source = self._source or system_source()
        for directory in ("lists/partial", "cache/archives/partial"):
            (self.root / directory).mkdir(parents=True, exist_ok=True)
        (self.root / "status").touch()
        option = f"[signed-by={source.signed_by}] " if source.signed_by else ""
        lines = [f"deb {option}{source.uri} {suite} main\n" for suite in self.suites]
        (self.root / "sources.list").write_text("".join(lines))
        settings = {
            "Dir::Etc::sourcelist": self.root / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "Dir::State": self.root,
            "Dir::State::lists": self.root / "lists",
            "Dir::State::status": self.root / "status",
            "Dir::Cache": self.root / "cache",
            "APT::Architecture": self.architecture,
            "Acquire::Languages": "none",
            "Acquire::Retries": "2",
            "Acquire::http::Timeout": "10",
            "Acquire::https::Timeout": "10",
            "APT::Sandbox::User": "root",
            "APT::Install-Recommends": "false",
            "APT::Get::Assume-Yes": "true",
            "Debug::NoLocking": "true",
        }
        text = "".join(f'{key} "{value}";\n' for key, value in settings.items())
        text += f'#clear APT::Architectures;\nAPT::Architectures {{ "{self.architecture}"; }};\n'
        # Hooks of the machine must not run here, and must not empty this cache.
        text += (
            "#clear DPkg::Post-Invoke;\n#clear APT::Update::Post-Invoke;\n#clear APT::Update::Post-Invoke-Success;\n"
        )
        (self.root / "apt.conf").write_text(text)

    def _run(self, command: Sequence[str], *, check: bool = True) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"APT_CONFIG": str(self.root / "apt.conf"), "LC_ALL": "C"}
        words = [command[0], *_KEEP_BINARY_LISTS, *command[1:]]
        done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False, cwd=self.pool())
        if check and done.returncode:
            raise LabError(f"{' '.join(command[:3])} ...: {done.stderr.strip()[-400:]}")
        return done

    @functools.cache  # noqa: B019 -- there are a few of these in a run
    def names(self, prefix: str) -> list[str]:
        """Return the packages with names that begin with `prefix`."""
        self.refresh()
        return self._run(["apt-cache", "pkgnames", prefix]).stdout.split()

    def fields(self, package: str) -> dict[str, str] | None:
        """Return the lists' record of the newest version of a package; None if it cannot be fetched."""
        self.refresh()
        done = self._run(["apt-cache", "show", "--no-all-versions", package], check=False)
        lines = [line for line in done.stdout.splitlines() if ": " in line and not line[0].isspace()]
        fields = dict(line.split(": ", 1) for line in lines)
        return fields if "Filename" in fields else None

    def download(self, packages: Sequence[str]) -> list[Path]:
        """Return the files of `packages`, fetched unless they are here.

        Raises:
            LabError: one cannot be had.
        """
        self.refresh()
        found = {}
        for package in packages:
            fields = self.fields(package)
            if fields is None:
                raise LabError(f"package {package} is not in {', '.join(self.suites)}")
            version = fields["Version"].replace(":", "%3a")
            found[package] = self.pool() / f"{package}_{version}_{fields['Architecture']}.deb"
        if missing := [package for package, path in found.items() if not path.exists()]:
            self._run(["apt-get", "download", *missing])
        return list(found.values())

    def with_dependencies(self, packages: Sequence[str]) -> list[Path]:
        """Return the files of `packages` and of all they depend on, fetched unless they are here.

        Raises:
            LabError: they cannot be had.
        """
        self.refresh()
        plan = self._run(["apt-get", "install", "--simulate", *packages]).stdout
        self._run(["apt-get", "install", "--download-only", *packages])
        found = re.findall(r"^Inst (\S+) \((\S+) .*\[(\w+)\]\)", plan, re.MULTILINE)
        return [self.pool() / f"{name}_{version.replace(':', '%3a')}_{kind}.deb" for name, version, kind in found]


def unpack(files: Sequence[Path], root: Path) -> None:
    """Unpack packages into `root`, without running anything of theirs."""
    root.mkdir(parents=True, exist_ok=True)
    for file in files:
        subprocess.run(["dpkg-deb", "--extract", file, root], check=True)
