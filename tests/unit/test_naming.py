"""Names of processes: the grammar, matches, and the facts from /proc and the links of containers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mthp.errors import UsageError
from mthp.linux.cgroups import Namespace
from mthp.linux.facts import FactsReader, Pods
from mthp.naming import COMM_BYTES, Match, ProcessFacts, match_of, user_id

ID = "3f2a" + "0" * 58 + "9b"
OTHER_ID = "77aa" + "1" * 60
UID = "0a1b2c3d-1111-2222-3333-445566778899"
SYSTEMD = f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UID.replace('-', '_')}.slice"
CGROUPFS = f"/kubepods/burstable/pod{UID}"

REDIS = ProcessFacts(
    7,
    1,
    uid=os.getuid(),
    comm="redis-server",
    exe="/usr/bin/redis-server",
    cgroup=f"/system.slice/redis.service/x/{ID}",
    pod="shop/redis-0",
    container_name="redis",
)


@pytest.mark.parametrize(
    ("word", "fits"),
    [
        ("all", True),
        ("comm:redis-server", True),
        ("comm:redis*", True),
        ("comm:redis", False),
        ("exe:/usr/bin/*", True),
        ("exe:redis-server", False),
        ("unit:redis", True),
        ("unit:redis.service", True),
        ("unit:red*", True),
        ("unit:system", False),
        ("cgroup:/system.slice", True),
        ("cgroup:system.slice/*", True),
        ("cgroup:/system.slice/", True),
        ("cgroup:/", True),
        ("cgroup:/system", False),
        ("pod:shop/redis-*", True),
        ("pod:redis-0", True),
        ("pod:bank/redis-0", False),
        ("container:3f2a", True),
        (f"container:{ID}", True),
        ("container:f2a0", False),
        ("container:redis", True),
        (f"user:{os.getuid()}", True),
        ("user:4294967294", False),
    ],
)
def test_a_name_fits_what_it_says(word: str, fits: bool) -> None:
    match = match_of(word)
    assert match is not None
    assert match.fits(REDIS) is fits


@pytest.mark.parametrize("word", ["redis", "12", "./comm:x", "a/b", "", "file:x", "c:d", ":x", "ALL", "pid:1", "uid:1"])
def test_what_is_no_name(word: str) -> None:
    assert match_of(word) is None


@pytest.mark.parametrize(("digits", "uid"), [("0", 0), ("7", 7), ("0" * 5000 + "7", 7), ("00", 0)])
def test_digits_are_the_number_of_a_user_however_many(digits: str, uid: int) -> None:
    assert user_id(digits) == user_id(uid) == uid
    assert match_of(f"user:{digits}") == Match(uid=(uid,))


def test_thousands_of_digits_are_the_number_of_no_user() -> None:
    assert user_id("9" * 5000) > 1 << 32
    # Digits of other scripts are a name.
    with pytest.raises(UsageError, match="unknown user"):
        user_id("\u0663")


@pytest.mark.parametrize("word", ["comm:", "cgroup:/sys/fs/cgroup/x", "user:no such user"])
def test_a_name_that_makes_no_sense_is_refused(word: str) -> None:
    with pytest.raises(UsageError) as caught:
        match_of(word)
    assert caught.value.help


def test_a_long_literal_name_is_cut_as_the_kernel_cuts_it() -> None:
    match = match_of("comm:a-process-with-a-long-name")
    assert match is not None
    assert match.fits(ProcessFacts(1, 1, comm="a-process-with-"))


def test_a_name_that_is_cut_within_a_character_or_is_no_text_fits_as_it_is_read(tmp_path: Path) -> None:
    for pid, comm in ((7, "é" * 10), (8, b"\xff\xfebad".decode(errors="surrogateescape"))):
        process(tmp_path, pid, cgroup="0::/\n")
        stat = tmp_path / str(pid) / "stat"
        raw = comm.encode(errors="surrogateescape")[:COMM_BYTES]
        stat.write_bytes(stat.read_bytes().replace(b"redis (x) y", raw))
        facts, match = FactsReader(str(tmp_path)).read(pid, ()), match_of(f"comm:{comm}")
        assert facts is not None
        assert match is not None
        assert match.fits(facts)
        shown = match_of(f"comm:{facts.comm}")
        assert shown is not None
        assert shown.fits(facts)


def test_a_link_to_an_executable_names_it(tmp_path: Path) -> None:
    program, link = tmp_path / "redis-check-rdb", tmp_path / "redis-server"
    link.symlink_to(program)
    match = match_of(f"exe:{link}")
    assert match is not None
    assert match.fits(ProcessFacts(1, 1, exe=str(program)))
    # In another mount namespace it may be a file.
    assert match.fits(ProcessFacts(1, 1, exe=str(link)))
    assert not match.fits(ProcessFacts(1, 1, exe=str(tmp_path / "other")))


def test_what_is_in_no_container_fits_no_pattern_of_containers_or_pods() -> None:
    alone = ProcessFacts(1, 1, comm="x", cgroup="/user.slice")
    assert not Match(container=("*",)).fits(alone)
    assert not Match(pod=("*/*",)).fits(alone)
    assert not Match(unit=("*",)).fits(alone)


@pytest.mark.parametrize(
    ("cgroup", "container", "units"),
    [
        (f"{SYSTEMD}/cri-containerd-{ID}.scope", ID, (f"cri-containerd-{ID}.scope",)),
        (f"{SYSTEMD}/crio-{ID}.scope/container", ID, (f"crio-{ID}.scope",)),
        (f"{CGROUPFS}/{ID}", ID, ()),
        (f"/docker/{ID}", ID, ()),
        (f"/system.slice/docker-{ID}.scope", ID, (f"docker-{ID}.scope",)),
        (f"/machine.slice/libpod-{ID}.scope/{OTHER_ID}", OTHER_ID, (f"libpod-{ID}.scope",)),
        (f"/system.slice/containerd.service/x.slice:cri-containerd:{ID}", ID, ("containerd.service",)),
        ("/user.slice/user-1.slice/user@1.service/app.slice/a.service", "", ("user@1.service", "a.service")),
        ("/system.slice/" + "a" * 65, "", ()),
        ("/", "", ()),
        ("", "", ()),
    ],
)
def test_containers_and_units_stand_in_the_path_of_a_control_group(
    cgroup: str, container: str, units: tuple[str, ...]
) -> None:
    facts = ProcessFacts(1, 1, cgroup=cgroup)
    assert (facts.container, facts.units) == (container, units)


def test_a_process_is_a_part_of_the_nearest_thing_that_has_a_name() -> None:
    def service(cgroup: str, pod: str = "") -> str:
        return ProcessFacts(1, 1, comm="java", cgroup=cgroup, pod=pod).service

    assert service(f"{CGROUPFS}/{ID}", pod="shop/cart") == "pod:shop/cart"
    assert service(f"/docker/{ID}") == f"container:{ID[:12]}"
    assert service("/system.slice/tomcat.service") == "unit:tomcat.service"
    assert service("/user.slice/session-1.scope") == "comm:java"
    assert service("/user.slice/user@1.service/app.slice/a.service") == "unit:a.service"


def test_one_property_is_more_specific_than_all_that_tell_less_and_then_the_shorter_pattern_counts() -> None:
    less = Match(uid=(1,), cgroup=("/a",), unit=("a.service",), pod=("a/a",), container=("a",), comm=("a",))
    assert Match(exe=("*",)).specificity > less.specificity
    assert Match(comm=("a*", "abcdef*")).specificity < Match(comm=("ab*",)).specificity


@pytest.mark.parametrize(
    ("one", "other", "shares"),
    [
        ("ab*", "*cd", True),
        ("a*c", "a*bc", True),
        ("a*c", "a*d", False),
        ("ab*", "cd*", False),
        # The ends fit, and overlap: no name is both.
        ("abc", "ab*bc", False),
    ],
)
def test_patterns_are_disjoint_if_their_fixed_ends_are(one: str, other: str, shares: bool) -> None:
    for ours, theirs in ((one, other), (other, one)):
        assert Match(comm=(ours,)).may_share_a_process(Match(comm=(theirs,))) is shares


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """Links as the kubelet makes them, of one container, and what else may lie there."""
    directory = tmp_path / "containers"
    directory.mkdir()
    log = f"/var/log/pods/shop_redis-0_{UID}/redis/0.log"
    (directory / f"redis-0_shop_redis-{ID}.log").symlink_to(log)
    (directory / "README").write_text("")
    (directory / f"not-a-link_shop_x-{OTHER_ID}.log").write_text("")
    return directory


@pytest.mark.parametrize(
    ("cgroup", "pod"),
    [
        (f"{SYSTEMD}/cri-containerd-{ID}.scope", ("shop/redis-0", "redis")),
        (f"{CGROUPFS}/{ID}", ("shop/redis-0", "redis")),
        # The container that holds the namespaces of the pod has no log: the pod's UID names it.
        (f"{SYSTEMD}/cri-containerd-{'c' * 64}.scope", ("shop/redis-0", "")),
        (f"{CGROUPFS}/{'c' * 64}", ("shop/redis-0", "")),
        (f"/kubepods/pod{'f' * 32}/{'c' * 64}", ("", "")),
        (f"/docker/{OTHER_ID}", ("shop/not-a-link", "x")),
        ("/system.slice/redis.service", ("", "")),
        ("", ("", "")),
    ],
)
def test_pods_by_the_links_of_their_logs(logs: Path, cgroup: str, pod: tuple[str, str]) -> None:
    assert Pods([logs.parent / "missing", logs]).of(cgroup) == pod


def test_a_pod_that_comes_and_one_that_goes(logs: Path) -> None:
    pods = Pods([logs])
    new = f"{CGROUPFS[:-1]}8/{OTHER_ID}"
    assert pods.of(new) == ("shop/not-a-link", "x")
    (logs / f"not-a-link_shop_x-{OTHER_ID}.log").unlink()
    os.utime(logs, ns=(1, 1))
    assert pods.of(new) == ("", "")
    (logs / f"new_bank_app-{OTHER_ID}.log").symlink_to("/dev/null")
    os.utime(logs, ns=(2, 2))
    assert pods.of(new) == ("bank/new", "app")


def test_no_links_are_no_pods(tmp_path: Path) -> None:
    assert Pods([tmp_path / "missing"]).of(f"/docker/{ID}") == ("", "")


def process(proc: Path, pid: int, *, comm: str = "redis (x) y", state: str = "S", flags: int = 0, cgroup: str) -> None:
    directory = proc / str(pid)
    (directory / "ns").mkdir(parents=True)
    fields = [state, *["1"] * 5, str(flags), *["0"] * 12, "4711", *["0"] * 20]
    (directory / "stat").write_text(f"{pid} ({comm}) {' '.join(fields)}\n")
    (directory / "status").write_text(f"Name:\tx\nUid:\t{os.getuid()}\t0\t0\t0\n")
    (directory / "cgroup").write_text(cgroup)
    (directory / "exe").symlink_to("/usr/bin/redis (deleted)")


ALL = ("uid", "exe", "cgroup", "unit", "pod", "container")


def test_facts_of_a_process(tmp_path: Path, logs: Path) -> None:
    proc = tmp_path / "proc"
    process(proc, 7, cgroup=f"12:memory:/x\n0::{CGROUPFS}/{ID}\n")
    reader = FactsReader(str(proc), [logs])
    facts = reader.read(7, ALL)
    assert facts == ProcessFacts(
        7, 4711, os.getuid(), "redis (x) y", "/usr/bin/redis", f"{CGROUPFS}/{ID}", "shop/redis-0", "redis"
    )
    assert reader.read(7, ()) == ProcessFacts(7, 4711, comm="redis (x) y")
    assert reader.read(8, ALL) is None
    assert reader.hidden(ALL) == ""


def test_kernel_threads_and_zombies_have_no_facts(tmp_path: Path) -> None:
    process(tmp_path, 2, flags=0x200000, cgroup="0::/\n")
    process(tmp_path, 3, state="Z", cgroup="0::/\n")
    process(tmp_path, 4, cgroup="0::/\n")
    (tmp_path / "5").mkdir()
    (tmp_path / "5" / "stat").write_text("5 (")
    reader = FactsReader(str(tmp_path))
    assert reader.pids() == [2, 3, 4, 5]
    assert [pid for pid in reader.pids() if reader.read(pid, ALL)] == [4]


@pytest.mark.parametrize(
    ("membership", "path"),
    [
        ("0::/a/b\n", "/a/b"),
        ("0::/\n", "/"),
        ("9:name=systemd:/system.slice/a.service\n4:memory:/m\n0::/\n", "/system.slice/a.service"),
        ("9:name=systemd:/system.slice/a.service\n0::/b\n", "/b"),
        ("9:name=systemd:/\n4:cpu,memory:/docker/x\n", "/docker/x"),
        ("0::/gone (deleted)\n", "/gone"),
        ("0::/a:b::c\n", "/a:b::c"),
        ("0::/../../system.slice/a.service\n", "/system.slice/a.service"),
        ("garbage\n", ""),
        ("", ""),
    ],
)
def test_the_path_of_a_control_group(membership: str, path: str) -> None:
    assert Namespace("/nonexistent").path_of(membership) == path


def test_a_namespace_that_hides_its_root_says_so(tmp_path: Path) -> None:
    process(tmp_path, 1, cgroup="0::/\n")
    (tmp_path / "1" / "ns" / "cgroup").write_text("")
    (tmp_path / "self").symlink_to("1")
    reader = FactsReader(str(tmp_path))
    assert reader.hidden(("comm", "uid")) == ""
    assert "cgroup namespace" in reader.hidden(("unit",))
