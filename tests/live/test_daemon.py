"""The daemon on live processes: finding targets, working, commands, and faults."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from daemons import RunningDaemon, events_of
from e2e.helpers import ancestors
from mthp.daemon.processes import REMATCH_SECONDS
from mthp.linux.live import open_live
from pids import successor_of
from targets import MADV_HUGEPAGE, PMD_SIZE, Puppet, threads_of
from thp_switches import ThpSwitches
from waiting import PATIENCE, until

pytestmark = [pytest.mark.live, pytest.mark.requires("root", "thp", "mthp", "pagemap_scan", "4k-pages")]

PAGES = PMD_SIZE // 4096
RANGES = 4


def small_pages(puppet: Puppet, ranges: int = RANGES) -> int:
    """Memory in base pages, advised only after it was filled."""
    address = puppet.map(ranges * PMD_SIZE)
    puppet.tell("madvise", address, ranges * PMD_SIZE, 15)
    puppet.write(address, ranges * PAGES)
    puppet.tell("madvise", address, ranges * PMD_SIZE, MADV_HUGEPAGE)
    return address


def huge_bytes(pid: int) -> int:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(text.split("AnonHugePages:")[1].split()[0]) << 10


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "mthp", *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def pmd_only(thp_switches: ThpSwitches) -> ThpSwitches:
    """Switch every size off, so that the kernel's khugepaged does nothing; the rules name the daemon's size."""
    thp_switches.only()
    return thp_switches


MOVE = ("--mechanism", "move")
HUGE = ("--orders", "2M", "--cpu", "100%")


@pytest.mark.usefixtures("pmd_only")
def test_it_collapses_its_target_tells_of_it_and_leaves_everything_as_it_was(run: Path, tmp_path: Path) -> None:
    log = tmp_path / "events"
    with Puppet() as puppet:
        address = small_pages(puppet)
        with RunningDaemon(run, "--pid", str(puppet.pid), *HUGE, "--events", str(log)) as daemon:
            until(lambda: daemon.collapsed(puppet.pid) >= RANGES * PMD_SIZE, "the collapse")
            shown = cli("status", "--run-dir", str(run))
            told = json.loads(cli("status", "--json", "--run-dir", str(run)).stdout)
            daemon.stop()
        assert huge_bytes(puppet.pid) >= RANGES * PMD_SIZE
        assert puppet.tell("read", address, RANGES * PAGES, 1) == RANGES * PAGES
    assert shown.returncode == 0
    assert str(puppet.pid) in shown.stdout
    assert told["schema"] == "mthp.status/1"
    assert told["counters"]["collapses"]["2M"] >= RANGES
    assert told["counters"]["calls"]["count"] >= RANGES
    assert {"target", "start", "collapsed", "stop"} <= {event["event"] for event in events_of(log)}
    assert not daemon.socket.exists()


@pytest.mark.slow
@pytest.mark.usefixtures("pmd_only")
def test_new_processes_are_noticed_and_ones_that_end_leave_nothing(run: Path, tmp_path: Path) -> None:
    log = tmp_path / "events"
    with RunningDaemon(run, "--comm", "sleep", "--events", str(log)) as daemon:
        delays = []
        for _ in range(5):
            begun = time.monotonic()
            child = subprocess.Popen(["sleep", "600"])
            until(lambda child=child: daemon.target(child.pid) is not None, "the new process")  # type: ignore[misc]
            delays.append(time.monotonic() - begun)
            child.kill()
            child.wait()
            until(lambda child=child: daemon.target(child.pid) is None, "the end of the process")  # type: ignore[misc]
            assert child.pid in {event["pid"] for event in events_of(log) if event["event"] == "target"}
    # Before all processes are listed again. A benchmark measures the tenth of a second.
    assert min(delays) < REMATCH_SECONDS / 2


@pytest.mark.slow
@pytest.mark.usefixtures("pmd_only")
@pytest.mark.requires("ns_last_pid")
def test_a_number_that_a_rule_names_means_the_process_that_had_it(run: Path) -> None:
    with Puppet() as first, RunningDaemon(run, "--pid", str(first.pid), "--comm", "sleep") as daemon:
        until(lambda: daemon.target(first.pid) is not None, "the process")
        first.kill()
        until(lambda: daemon.target(first.pid) is None, "its end")
        with successor_of(first.pid) as second, subprocess.Popen(["sleep", "60"]) as later:
            until(lambda: daemon.target(later.pid) is not None, "the process that came after it")
            assert daemon.target(second.pid) is None
            later.kill()


def test_a_number_that_nobody_has_is_told(run: Path) -> None:
    with Puppet() as gone:
        gone.kill()
    with RunningDaemon(run, "--pid", str(gone.pid)) as daemon:
        assert f"process {gone.pid} does not exist" in daemon.said


@pytest.mark.slow
@pytest.mark.usefixtures("pmd_only")
def test_thousands_of_short_lived_processes_are_passed_over(run: Path) -> None:
    with RunningDaemon(run, "--comm", "true") as daemon:
        before, own_before = daemon.status(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(["bash", "-c", f"for i in $(seq 1000); do {shutil.which('true')}; done"], check=True)
        after, own = daemon.status(), resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = own.ru_utime + own.ru_stime - own_before.ru_utime - own_before.ru_stime
        assert after["cpu_seconds"] - before["cpu_seconds"] < spent
        until(lambda: not daemon.status()["targets"], "all of them to be gone")
        assert len(list(Path(f"/proc/{daemon.process.pid}/fd").iterdir())) < 60
    assert "error" not in daemon.said


@pytest.mark.usefixtures("pmd_only")
def test_pause_and_resume(run: Path) -> None:
    with Puppet() as puppet, RunningDaemon(run, "--pid", str(puppet.pid), *HUGE) as daemon:
        until(lambda: daemon.target(puppet.pid) is not None, "the target")
        assert cli("pause", "--run-dir", str(run)).stdout == "paused\n"
        until(lambda: not daemon.status()["busy"], "the end of the piece at hand")
        # Whatever the program itself has that can be collapsed may have been by now.
        before = daemon.collapsed(puppet.pid)
        small_pages(puppet)
        time.sleep(0.5)
        assert daemon.collapsed(puppet.pid) == before
        assert daemon.status()["paused"]
        assert json.loads(cli("resume", "--json", "--run-dir", str(run)).stdout)["paused"] is False
        until(lambda: daemon.collapsed(puppet.pid) >= before + RANGES * PMD_SIZE, "the collapse")


@pytest.mark.usefixtures("pmd_only")
def test_rules_are_read_again_on_sighup_and_bad_ones_are_refused_as_a_whole(run: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rule]]\nmatch = { comm = "nobody" }\n')
    with Puppet() as puppet, RunningDaemon(run, "--config", str(rules)) as daemon:
        rules.write_text(f'[[rule]]\nmatch = {{ pid = {puppet.pid} }}\npolicy = "best"\n')
        daemon.process.send_signal(signal.SIGHUP)
        until(lambda: daemon.status()["refused_reloads"] == 1, "the refusal")
        assert "unknown policy 'best'" in daemon.said
        assert daemon.target(puppet.pid) is None
        rules.write_text(f'[[rule]]\nname = "mine"\nmatch = {{ pid = {puppet.pid} }}\npolicy = "rfc"\n')
        daemon.process.send_signal(signal.SIGHUP)
        until(lambda: daemon.target(puppet.pid) is not None, "the new rule")
        assert (daemon.target(puppet.pid) or {})["policy"] == "rfc"
        rules.write_text(f"[[rule]]\nmatch = {{ pid = {puppet.pid} }}\ndeny = true\n")
        daemon.process.send_signal(signal.SIGHUP)
        until(lambda: daemon.target(puppet.pid) is None, "the denial")
        assert threads_of(puppet.pid)


@pytest.mark.slow
def test_files_of_conf_d_come_and_go_on_sighup(run: Path, tmp_path: Path) -> None:
    more = tmp_path / "etc" / "conf.d"
    more.mkdir(parents=True)
    (tmp_path / "etc" / "mthp.toml").write_text('[daemon]\ncpu = "5%"\n')
    with Puppet() as puppet, RunningDaemon(run, "--config", str(tmp_path / "etc")) as daemon:
        (more / "twice.toml").write_text('[daemon]\ncpu = "6%"\n')
        daemon.process.send_signal(signal.SIGHUP)
        until(lambda: daemon.status()["refused_reloads"] == 1, "the refusal")
        assert "twice.toml:2: daemon.cpu is set twice" in daemon.said
        (more / "twice.toml").unlink()
        (more / "mine.toml").write_text(f"[[rule]]\nmatch = {{ pid = {puppet.pid} }}\n")
        daemon.process.send_signal(signal.SIGHUP)
        until(lambda: daemon.target(puppet.pid) is not None, "the new rule")
        assert daemon.status()["cpu"] == 0.05
        (more / "mine.toml").unlink()
        daemon.process.send_signal(signal.SIGHUP)
        until(lambda: daemon.target(puppet.pid) is None, "the end of the rule")


@pytest.mark.usefixtures("thp_switches")
def test_sizes_that_take_the_mover_are_left_with_the_price(run: Path) -> None:
    with (
        Puppet() as puppet,
        RunningDaemon(run, "--pid", str(puppet.pid), "--orders", "64K", "--cpu", "100%") as daemon,
    ):
        small_pages(puppet)
        until(lambda: (daemon.target(puppet.pid) or {}).get("left_out"), "the reason")
        said = (daemon.target(puppet.pid) or {})["left_out"]
        assert said.startswith("64K: ")
        assert "5 ms at a time: --mechanism move" in said
        assert daemon.collapsed(puppet.pid) == 0
        assert "--mechanism move" in cli("status", "--run-dir", str(run)).stdout


def test_the_command_line_takes_what_a_rule_takes(run: Path) -> None:
    words = ("--mechanism", "madvise,move", "--reserve", "1G", "--max-threads", "5", "--pause-share", "20%")
    done = cli("daemon", "--all", "--exe", "/bin/x*", "--uid", "root", "--uid", "7", *words, "--check-config")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("3 rules")


@pytest.mark.slow
def test_switches_of_the_system_are_followed(run: Path, pmd_only: ThpSwitches) -> None:
    with Puppet() as puppet, RunningDaemon(run, "--pid", str(puppet.pid), "--cpu", "100%", *MOVE) as daemon:
        small_pages(puppet)
        until(lambda: ((daemon.target(puppet.pid) or {}).get("passes", 0)) > 0, "a first look")
        time.sleep(0.5)
        assert daemon.collapsed(puppet.pid) == 0
        pmd_only.set("hugepages-512kB/enabled", "madvise")
        until(lambda: daemon.collapsed(puppet.pid) >= RANGES * PMD_SIZE, "the collapse")


@pytest.mark.usefixtures("pmd_only")
def test_metrics_are_read_by_a_parser_of_prometheus(run: Path) -> None:
    port = _free_port()
    with Puppet() as puppet:
        small_pages(puppet)
        arguments = ("--pid", str(puppet.pid), *HUGE, "--metrics", str(port))
        with RunningDaemon(run, *arguments) as daemon:
            until(lambda: daemon.collapsed(puppet.pid) >= RANGES * PMD_SIZE, "the collapse")
            page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE).read().decode()
    families = {family.name: family for family in text_string_to_metric_families(page)}
    by_size = {sample.labels["size"]: sample.value for sample in families["mthp_collapses"].samples}
    assert by_size["2M"] >= RANGES
    assert by_size["64K"] == 0
    assert families["mthp_copied_bytes"].samples[0].value >= RANGES * PMD_SIZE
    assert families["mthp_call_seconds"].type == "histogram"
    assert families["mthp_targets"].samples[0].value == 1
    assert {"mthp_pause_seconds", "mthp_collapse_failures", "mthp_scanned_ptes", "mthp_cpu_seconds"} <= set(families)


@pytest.mark.slow
@pytest.mark.usefixtures("pmd_only")
def test_the_service_is_known_of_a_process_that_a_rule_finds_by_its_pid(run: Path) -> None:
    mounts = (line.split() for line in Path("/proc/mounts").read_text().splitlines())
    mount = next((words[1] for words in mounts if words[2] == "cgroup2"), None)
    if mount is None:
        pytest.skip("needs cgroup v2")
    group = Path(mount) / f"mthp-test-{os.getpid()}.service"
    group.mkdir()
    port = _free_port()
    try:
        with Puppet() as puppet:
            (group / "cgroup.procs").write_text(str(puppet.pid))
            small_pages(puppet)
            with RunningDaemon(run, "--pid", str(puppet.pid), *HUGE, "--metrics", str(port)) as daemon:
                until(lambda: daemon.collapsed(puppet.pid) >= RANGES * PMD_SIZE, "the collapse")
                target = daemon.target(puppet.pid)
                page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE).read().decode()
    finally:
        until(lambda: not (group / "cgroup.procs").read_text(), "the end of the process")
        group.rmdir()
    assert target is not None
    assert target["service"] == f"unit:{group.name}"
    families = {family.name: family for family in text_string_to_metric_families(page)}
    (sample,) = families["mthp_service_collapsed_bytes"].samples
    assert (sample.labels["service"], sample.value >= RANGES * PMD_SIZE) == (target["service"], True)


@pytest.mark.slow
@pytest.mark.usefixtures("pmd_only")
def test_clients_that_ask_without_end_do_not_stop_the_work(run: Path) -> None:
    port, stop = _free_port(), threading.Event()

    def ask_for(what: Callable[[], object]) -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError):
                what()

    arguments = ("--orders", "2M", "--cpu", "3%", "--metrics", str(port))
    with Puppet() as puppet, RunningDaemon(run, "--pid", str(puppet.pid), *arguments) as daemon:
        asking = [
            threading.Thread(target=ask_for, args=(what,))
            for what in (
                daemon.status,
                lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE).read(),
            )
        ]
        for thread in asking:
            thread.start()
        try:
            used = daemon.status()["cpu_seconds"]
            until(lambda: daemon.status()["cpu_seconds"] > used + 1, "a debt that would take half a minute")
            small_pages(puppet)
            until(lambda: daemon.collapsed(puppet.pid) >= RANGES * PMD_SIZE, "the collapse")
        finally:
            stop.set()
            for thread in asking:
                thread.join()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


# What goes wrong at the start.


def refused(run: Path, *arguments: str, prefix: tuple[str, ...] = ()) -> tuple[int, str]:
    """Exit code and output of a daemon that does not start."""
    daemon = RunningDaemon(run, *arguments, wait=False, prefix=prefix)
    return daemon.process.wait(PATIENCE), daemon.said


def test_a_second_daemon_is_refused_and_told_who_the_first_is(run: Path) -> None:
    with RunningDaemon(run, "--comm", "nobody") as daemon:
        code, said = refused(run, "--comm", "nobody")
        assert code == 1
        assert f"another mthp daemon is running: process {daemon.process.pid}" in said
        assert daemon.status()["pid"] == daemon.process.pid


def test_a_port_that_is_taken(run: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        code, said = refused(run, "--all", "--metrics", str(sock.getsockname()[1]))
    assert code == 2
    assert "metrics cannot be served" in said
    assert "Traceback" not in said


def test_a_socket_whose_place_is_taken(run: Path) -> None:
    run.mkdir()
    (run / "daemon.sock").write_text("not a socket")
    code, said = refused(run, "--all")
    assert code == 2
    assert "is not a socket" in said
    assert (run / "daemon.sock").read_text() == "not a socket"


def test_without_rights_it_says_which_are_missing(run: Path) -> None:
    drop = ("setpriv", "--bounding-set", "-sys_ptrace,-sys_nice", "--inh-caps", "-sys_ptrace,-sys_nice")
    code, said = refused(run, "--all", prefix=drop)
    assert code == 3
    assert "CAP_SYS_PTRACE" in said
    assert "CAP_SYS_NICE" in said
    assert "CAP_SYS_ADMIN" not in said


@pytest.mark.slow
def test_where_the_kernel_tells_of_no_processes_it_looks_for_them_itself(run: Path) -> None:
    # The connector is in the first network namespace only.
    with RunningDaemon(run, "--comm", "sleep", prefix=("unshare", "--net")) as daemon:
        assert "no process events" in daemon.said
        assert daemon.status()["finds_processes_by"] == "reading /proc"
        child = subprocess.Popen(["sleep", "600"])
        until(lambda: daemon.target(child.pid) is not None, "the new process")
        child.kill()
        child.wait()
        until(lambda: daemon.target(child.pid) is None, "the end of the process")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "no rules: "),
        (("--config", "/nonexistent/rules.toml"), "No such file"),
        (("--all", "--orders", "3K"), "is not a folio size"),
        (("--all", "--policy", "best"), "unknown policy"),
        (("--all", "--cpu", "0%"), "not above 0"),
        (("--all", "--metrics", "nowhere:x"), "not an address"),
        (("--config", "x", "--all"), "--config and --all"),
        (("--all", "--events", "/nonexistent/events"), "event log"),
    ],
)
def test_wrong_usage_is_exit_code_2_and_says_what_is_wrong(run: Path, arguments: tuple[str, ...], said: str) -> None:
    code, text = refused(run, *arguments)
    assert code == 2
    assert said in text
    assert "Traceback" not in text


def test_status_without_a_daemon(run: Path) -> None:
    done = cli("status", "--run-dir", str(run))
    assert done.returncode == 1
    assert "no daemon is running" in done.stderr
    assert json.loads(cli("pause", "--json", "--run-dir", str(run)).stdout)["error"]["exit_code"] == 1


# What goes wrong meanwhile.


@contextlib.contextmanager
def at_work(run: Path, switches: ThpSwitches, *arguments: str) -> Iterator[tuple[RunningDaemon, Puppet, int]]:
    """A daemon that moves 64 MiB of a puppet to folios of 64K, slowly enough to be met at work."""
    switches.only("64kB")
    with Puppet() as puppet:
        address = small_pages(puppet, 32)
        with RunningDaemon(run, "--pid", str(puppet.pid), "--cpu", "100%", *MOVE, "--rate", "8M", *arguments) as daemon:
            until(lambda: daemon.collapsed(puppet.pid) > 0, f"work to begin: {daemon.said}")
            yield daemon, puppet, address


def test_a_target_that_is_killed_is_a_normal_event(run: Path, thp_switches: ThpSwitches) -> None:
    with at_work(run, thp_switches) as (daemon, puppet, _):
        puppet.kill()
        until(lambda: not daemon.status()["targets"], "the target to be dropped")
        assert "Traceback" not in daemon.said


@pytest.mark.slow
def test_a_target_that_is_stopped_stays_stopped_and_goes_on_when_told(run: Path, thp_switches: ThpSwitches) -> None:
    with at_work(run, thp_switches) as (daemon, puppet, address):
        os.kill(puppet.pid, signal.SIGSTOP)
        until(lambda: set(threads_of(puppet.pid).values()) <= {"T", "t"}, "the stop")
        before = daemon.collapsed(puppet.pid)
        until(lambda: daemon.collapsed(puppet.pid) > before or not daemon.status()["busy"], "the next piece of work")
        daemon.stop()
        until(lambda: set(threads_of(puppet.pid).values()) == {"T"}, "the stop to be what it was")
        os.kill(puppet.pid, signal.SIGCONT)
        assert puppet.tell("read", address, 32 * PAGES, 1) == 32 * PAGES


@pytest.mark.slow
def test_a_target_that_forks_unmaps_and_maps_meanwhile_is_never_harmed(run: Path, thp_switches: ThpSwitches) -> None:
    with at_work(run, thp_switches) as (daemon, puppet, address):
        for _ in range(5):
            puppet.tell("fork")
            other = small_pages(puppet, 2)
            time.sleep(0.05)
            assert puppet.tell("read", other, 2 * PAGES, 1) == 2 * PAGES
            puppet.tell("munmap", other, 2 * PMD_SIZE)
        assert puppet.tell("read", address, 32 * PAGES, 1) == 32 * PAGES
        assert "Traceback" not in daemon.said
        assert daemon.target(puppet.pid) is not None


@pytest.mark.slow
def test_a_target_that_becomes_another_program_is_matched_anew(run: Path, thp_switches: ThpSwitches) -> None:
    thp_switches.only()
    script = "read; exec sleep 600"
    with RunningDaemon(run, "--comm", "bash") as daemon:
        child = subprocess.Popen(["bash", "-c", script], stdin=subprocess.PIPE, text=True)
        until(lambda: daemon.target(child.pid) is not None, "the shell")
        assert child.stdin is not None
        child.stdin.write("go on\n")
        child.stdin.close()
        until(lambda: daemon.target(child.pid) is None, "the program that it became")
        assert child.poll() is None
        child.kill()
        child.wait()


@pytest.mark.slow
def test_suspended_at_work_every_switch_is_back_and_every_thread_runs(run: Path, thp_switches: ThpSwitches) -> None:
    with at_work(run, thp_switches) as (daemon, puppet, address):
        os.kill(daemon.process.pid, signal.SIGTSTP)
        until(lambda: "T" in threads_of(daemon.process.pid).values(), "it to be suspended")
        assert "[madvise]" in _switch("64kB")
        assert set(threads_of(puppet.pid).values()) <= {"S", "R"}
        assert puppet.tell("read", address, 32 * PAGES, 1) == 32 * PAGES
        os.kill(daemon.process.pid, signal.SIGCONT)
        assert not daemon.status()["paused"]


@pytest.mark.slow
def test_ended_at_work_every_switch_is_back_and_every_thread_runs(run: Path, thp_switches: ThpSwitches) -> None:
    with at_work(run, thp_switches) as (daemon, puppet, address):
        daemon.stop()
        with open_live(puppet.pid) as space:
            orders = space.read([(address, address + 32 * PMD_SIZE)]).folio_order
        assert 0 < (orders == 4).sum() < 32 * PAGES, "it does not end at the signal, but when all is done"
        assert "[madvise]" in _switch("64kB")
        assert set(threads_of(puppet.pid).values()) <= {"S", "R"}
        assert puppet.tell("read", address, 32 * PAGES, 1) == 32 * PAGES


@pytest.mark.slow
def test_killed_at_work_the_next_start_puts_right_what_was_left(run: Path, thp_switches: ThpSwitches) -> None:
    for _ in range(20):
        with at_work(run, thp_switches) as (daemon, puppet, address):
            daemon.stop(signal.SIGKILL)
            if puppet.died_with_its_tracer():
                continue
            _check_the_next(run, puppet, address)
            return
    pytest.fail("the target died with the daemon each time")


def _check_the_next(run: Path, puppet: Puppet, address: int) -> None:
    assert puppet.tell("read", address, 32 * PAGES, 1) == 32 * PAGES
    with RunningDaemon(run, "--pid", str(puppet.pid), "--cpu", "100%", *MOVE) as after:
        until(lambda: "[madvise]" in _switch("64kB"), "the switch to be as it was")
        until(lambda: after.collapsed(puppet.pid) > 0, "the next one to go on")
    assert "[madvise]" in _switch("64kB")
    assert puppet.tell("read", address, 32 * PAGES, 1) == 32 * PAGES


def _switch(size: str) -> str:
    return Path(f"/sys/kernel/mm/transparent_hugepage/hugepages-{size}/enabled").read_text()


@pytest.mark.slow
def test_a_full_disk_under_the_event_log_is_said_and_stops_nothing(run: Path, thp_switches: ThpSwitches) -> None:
    with at_work(run, thp_switches, "--events", "/dev/full") as (daemon, puppet, _):
        before = daemon.collapsed(puppet.pid)
        until(lambda: daemon.collapsed(puppet.pid) > before, "work to go on")
        assert daemon.said.count("No space left on device") == 1


@pytest.mark.slow
def test_a_service_manager_hears_of_readiness_and_life(run: Path, tmp_path: Path, pmd_only: ThpSwitches) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        sock.settimeout(PATIENCE)
        prefix = ("env", f"NOTIFY_SOCKET={path}", "WATCHDOG_USEC=400000")
        told: list[bytes] = []
        with RunningDaemon(run, "--comm", "nobody", prefix=prefix) as daemon:
            while not any(b"WATCHDOG=1" in message for message in told):
                told.append(sock.recv(1000))
            daemon.stop()
        while not any(b"STOPPING=1" in message for message in told):
            told.append(sock.recv(1000))
    assert told[0].startswith(b"READY=1")


def test_it_leaves_itself_and_those_it_descends_from_alone(run: Path, pmd_only: ThpSwitches) -> None:
    # The puppet is this test's child, not its ancestor; on a machine with nothing else it is the only target.
    with Puppet() as puppet, RunningDaemon(run, "--all") as daemon:
        until(lambda: daemon.target(puppet.pid) is not None, "the target")
        pids = {target["pid"] for target in daemon.status()["targets"]}
        assert not pids & {os.getpid(), daemon.process.pid, *ancestors()}


def test_the_unit_is_printed_with_absolute_paths(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mthp", "daemon", "--config", "rules.toml", "--print-unit"],
        capture_output=True,
        text=True,
        check=False,
        cwd=_with_rules(tmp_path),
    )
    assert done.returncode == 0
    assert f"daemon --config {tmp_path}/rules.toml\n" in done.stdout


def _with_rules(directory: Path) -> Path:
    (directory / "rules.toml").write_text("[[rule]]\nmatch = {}\n")
    return directory
