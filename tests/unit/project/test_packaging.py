"""Packages of mthp: metadata, metrics of dashboards and alerts, the DaemonSet, contents of the Debian package."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest

import mthp
from mthp.daemon import exporter
from mthp.daemon.systemd import CAPABILITIES
from mthp.geometry import X86_64
from rules_text import parse_configuration

ROOT = Path(__file__).parents[3]
PACKAGING = ROOT / "packaging"


def families() -> set[str]:
    """Names of the metric families, from the source of the page."""
    tree = ast.parse(Path(exporter.__file__).read_text())
    words = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return {word for word in words if re.fullmatch("mthp_[a-z_]+", word)}


@pytest.mark.parametrize("name", ["grafana/mthp.json", "prometheus/mthp-alerts.yaml"])
def test_a_dashboard_shows_metrics_that_exist(name: str) -> None:
    used = set(re.findall(r"\bmthp_[a-z_]+", (PACKAGING / name).read_text()))
    assert used
    assert {re.sub("_(total|bucket|sum|count)$", "", word) for word in used} <= families()


def test_the_dashboard_is_one_that_grafana_reads() -> None:
    panels = json.loads((PACKAGING / "grafana" / "mthp.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel["title"] and panel["description"] and panel["targets"] for panel in panels)


def documents(name: str) -> list[Any]:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML, which mthp[docs] brings")
    return list(yaml.safe_load_all((PACKAGING / name).read_text()))


def test_the_alerts_say_what_to_do() -> None:
    (document,) = documents("prometheus/mthp-alerts.yaml")
    for group in document["groups"]:
        for rule in group["rules"]:
            assert rule["expr"]
            assert rule["annotations"].keys() >= {"summary"}


def test_the_daemonset_has_the_capabilities_of_the_unit_and_rules_that_are_read() -> None:
    rules, daemonset = documents("kubernetes/daemonset.yaml")
    assert parse_configuration(rules["data"]["mthp.toml"], X86_64).rules.rules
    (container,) = daemonset["spec"]["template"]["spec"]["containers"]
    # The profile of the runtime denies writes below /sys/kernel/mm, and ptrace of processes outside of containers.
    assert container["securityContext"]["appArmorProfile"] == {"type": "Unconfined"}
    assert {f"CAP_{name}" for name in container["securityContext"]["capabilities"]["add"]} == set(CAPABILITIES)
    assert container["image"] == f"mthp:{mthp.__version__}"


def test_the_image_installs_what_the_daemon_needs() -> None:
    text = (PACKAGING / "container" / "Containerfile").read_text()
    (extras,) = re.findall(r"/src\[(.*)\]", text)
    assert set(extras.split(",")) <= set(project()["optional-dependencies"])
    ignored = set((ROOT / ".dockerignore").read_text().split())
    assert ignored.isdisjoint({"src", "pyproject.toml", *project()["license-files"], project()["readme"]})


def project() -> dict[str, Any]:
    return dict(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"])


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel, and the source distribution."""
    pytest.importorskip("hatchling", reason="needs hatchling (mthp[dev])")
    directory = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", directory], cwd=ROOT, check=True)
    return next(directory.glob("*.whl")), next(directory.glob("*.tar.gz"))


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as files:
        (name,) = [name for name in files.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(files.read(name).decode())


def test_the_metadata_are_complete(built: tuple[Path, Path]) -> None:
    found = metadata(built[0])
    assert found["Version"] == mthp.__version__
    assert found["License-Expression"] == "Apache-2.0"
    assert found["Description-Content-Type"] == "text/markdown"
    for key in ("Author", "Summary", "Keywords", "Classifier", "Requires-Python", "License-File"):
        assert found[key], key
    asked = {extra for path in (ROOT / "src").rglob("*.py") for extra in re.findall(r"mthp\[(\w+)\]", path.read_text())}
    assert asked <= set(found.get_all("Provides-Extra", []))


def test_the_source_distribution_has_what_make_needs(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    makefile = (ROOT / "Makefile").read_text()
    used = set(re.findall(r"\b((?:docs|packaging)/[\w/]+\.?\w*)", makefile))
    assert used
    assert used | {"Makefile", "mkdocs.yml", "CITATION.cff", "changes/README.md", "bench/peers.py"} <= names
    with zipfile.ZipFile(built[0]) as files:
        assert {"mthp/py.typed", "mthp/report/page.html.jinja"} <= set(files.namelist())


def test_the_citation_and_the_package_agree() -> None:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML, which mthp[docs] brings")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["license"] == project()["license"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in project()["authors"]]
    assert citation.keys() >= {"cff-version", "message", "title", "type"}
    # The version stands in one file.
    assert "version" not in citation


RESTART, RELOAD = "try-restart mthp.service", "daemon-reload"


@pytest.mark.parametrize(
    ("script", "arguments", "calls", "logs"),
    [
        ("postinst", ["configure", ""], [RELOAD], True),
        ("postinst", ["configure", "0.0.9"], [RELOAD, RESTART], True),
        ("postinst", ["abort-upgrade", "0.0.9"], [], True),
        ("prerm", ["upgrade", "0.2.0"], [], True),
        ("prerm", ["remove"], ["disable --now mthp.service"], True),
        ("postrm", ["remove"], [RELOAD], True),
        ("postrm", ["purge"], [], False),
    ],
)
@pytest.mark.parametrize("has_systemd", [True, False])
def test_the_scripts_of_the_package_may_run_twice_and_where_nothing_is_there(
    tmp_path: Path, script: str, arguments: list[str], calls: list[str], logs: bool, has_systemd: bool
) -> None:
    system, called = tmp_path / "system", tmp_path / "called"
    (tmp_path / "logs").mkdir()
    called.touch()
    if has_systemd:
        system.mkdir()
    program = tmp_path / "systemctl"
    program.write_text(f'#!/bin/sh\necho "$*" >> {called}\nexit 1\n')
    program.chmod(0o755)
    # Nothing else is found: not what compiles or cleans Python files of this machine.
    (tmp_path / "rm").symlink_to("/bin/rm")
    text = (PACKAGING / "debian" / script).read_text()
    text = text.replace("/run/systemd/system", str(system)).replace("/var/log/mthp", str(tmp_path / "logs"))
    for _ in range(2):
        done = subprocess.run(
            ["/bin/sh", "-s", *arguments],
            input=text,
            env={"PATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert called.read_text().splitlines() == (2 * calls if has_systemd else [])
    assert (tmp_path / "logs").exists() == logs


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_the_debian_package_has_the_program_its_unit_and_its_pages(tmp_path: Path) -> None:
    pytest.importorskip("click_man", reason="needs click-man (mthp[docs])")
    done = subprocess.run(
        [PACKAGING / "build_deb.sh", sys.executable, tmp_path], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    (package,) = tmp_path.glob("*.deb")
    listed = subprocess.run(["dpkg-deb", "--contents", package], capture_output=True, text=True, check=True).stdout
    names = {line.split()[5] for line in listed.splitlines()}
    assert names >= {
        "./usr/bin/mthp",
        "./usr/lib/python3/dist-packages/mthp/cli/__init__.py",
        "./usr/lib/systemd/system/mthp.service",
        "./usr/share/man/man1/mthp-collapse.1.gz",
        "./usr/share/bash-completion/completions/mthp",
        "./usr/share/zsh/vendor-completions/_mthp",
        "./usr/share/fish/vendor_completions.d/mthp.fish",
        "./etc/mthp/mthp.toml",
    }
    assert all(line.split()[1] == "root/root" for line in listed.splitlines())
    (field,) = re.findall(r"\nVersion: (.*)", f"\n{_field(package)}")
    assert field == mthp.__version__
    subprocess.run(["dpkg-deb", "--extract", package, tmp_path / "tree"], check=True)
    # Nothing is collapsed before an administrator has written a rule.
    assert not parse_configuration((tmp_path / "tree/etc/mthp/mthp.toml").read_text(), X86_64).rules.rules


def _field(package: Path) -> str:
    return subprocess.run(["dpkg-deb", "--field", package], capture_output=True, text=True, check=True).stdout
