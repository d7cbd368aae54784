"""Packages of mthp: metrics of dashboards and alerts, capabilities of the DaemonSet, contents of the Debian package."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mthp
from mthp.daemon import exporter
from mthp.daemon.config import parse_configuration
from mthp.daemon.systemd import CAPABILITIES
from mthp.geometry import X86_64

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
    # The profile of the runtime denies writes below /sys/kernel/mm, and ptrace of what is in no container.
    assert container["securityContext"]["appArmorProfile"] == {"type": "Unconfined"}
    assert {f"CAP_{name}" for name in container["securityContext"]["capabilities"]["add"]} == set(CAPABILITIES)
    assert container["image"] == f"mthp:{mthp.__version__}"


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
