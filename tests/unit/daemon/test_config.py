"""The rules files: values that are read, and errors with their place."""

from __future__ import annotations

from pathlib import Path

import pytest

from mthp.cli import main
from mthp.daemon import config
from mthp.daemon.config import Configuration, load_configuration, parse_endpoint
from mthp.errors import UsageError
from mthp.geometry import X86_64
from mthp.tunables import Switches, Tunables
from rules_text import parse_configuration


def parsed(text: str) -> Configuration:
    return parse_configuration(text, X86_64)


def refused(text: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        parsed(text)
    return caught.value


def test_rules_that_are_equally_specific_and_differ_clash_by_name() -> None:
    error = refused(
        '[[rule]]\nname = "one"\nmatch = { comm = "a*" }\npolicy = "rfc"\n'
        '[[rule]]\nname = "two"\nmatch = { comm = ["b", "a?"] }\nmax_pause = "2ms"\n'
    )
    assert "'one'" in error.message
    assert "'two'" in error.message
    assert "policy" in error.message
    assert "max_pause_ns" in error.message


@pytest.mark.parametrize(
    ("one", "other", "settings"),
    [
        ('comm = "ab"', 'comm = "cd"', 'policy = "rfc"'),
        ('comm = "ab*"', 'comm = "cd*"', 'policy = "rfc"'),
        ('comm = "a*"', 'comm = "ab*"', 'policy = "rfc"'),
        ('comm = "ab"', 'exe = "/bin/ab"', 'policy = "rfc"'),
        ("pid = 1", "pid = 2", 'policy = "rfc"'),
        ('comm = "ab"', 'comm = "ab"', ""),
    ],
)
def test_rules_for_different_processes_or_with_the_same_settings_do_not_clash(
    one: str, other: str, settings: str
) -> None:
    found = parsed(f"[[rule]]\nmatch = {{ {one} }}\n[[rule]]\nmatch = {{ {other} }}\n{settings}\n")
    assert len(found.rules.rules) == 2


@pytest.mark.parametrize(
    ("text", "message", "help"),
    [
        (
            '[[rule]]\nmatch = {}\npolcy = "rfc"',
            "rules.toml:3: rule 1.polcy is an unknown key",
            "did you mean 'policy'?",
        ),
        ('[deamon]\ncpu = "1%"', "rules.toml:1: deamon is an unknown key", "daemon"),
        ("[[rule]]\nmatch = { com = 1 }", "rules.toml:2: rule 1.match.com is an unknown key", "comm"),
        ('[daemon]\n\ncpu = "much"', "rules.toml:3: daemon.cpu: 'much' is not a share", "20%"),
        ('[defaults]\norders = "3K"', "rules.toml:2: defaults.orders: '3K' is not a folio size", "16K"),
        ('[defaults]\npolicy = "best"', "rules.toml:2: defaults.policy: unknown policy 'best'", "mainline"),
        ("[tunables]\nmax_ptes_none = 512", "rules.toml:2: tunables.max_ptes_none: 512 is out of range", "0 to 511"),
        ('[switches]\n"64K" = "on"', "rules.toml:2: switches.64K: 'on' is not known", "always"),
        ('[[rule]]\nmatch = { uid = "nobody-of-that-name" }', "unknown user", "getent"),
        ("[[rule]]\npolicy = 'rfc'", "rules.toml:1: rule 1 has no match", "match ="),
        ("[[rule]]\nmatch = {}\ndeny = true\npolicy = 'rfc'", "rules.toml:1: rule 1 denies, and sets policy", "remove"),
        (
            "[[rule]]\nmatch = {}\nsmall = true",
            "rules.toml:1: rule 1 has small, which the mechanism auto",
            "madvise,move",
        ),
        (
            "[defaults]\nsmall = true\n[[rule]]\nmatch = {}\nmechanism = 'split'",
            "has small, which the mechanism split",
            "move",
        ),
        ("[[rule]]\nmatch = { cgroup = '/sys/fs/cgroup/a' }", "is a path of the file system", "below"),
        ("[[rule]]\nmatch = { comm = [] }", "an empty list has no effect", "leave it out"),
        ("[[rule]]\nmatch = 'redis'", "rules.toml:2: rule 1.match is not a table", "match = { ... }"),
        ("daemon = 1", "rules.toml:1: daemon is not a table", "[daemon] on a line"),
        ("[rule]\nmatch = {}", "rules.toml:1: rule is not a list of tables", "[[rule]]"),
        ("a = ", "rules.toml: not TOML: Invalid value", "TOML"),
        ('[defaults]\nmax_pause = "1"', "max_pause: '1' has no unit", "1ms"),
        ('[defaults]\npause_share = "0%"', "pause_share: '0%' is not above 0", "larger"),
        ("[defaults]\nmax_bloat = 5", "max_bloat: 5 has no unit", "5%"),
        ('[defaults]\nrate = "500"', "rate: '500' has no unit", "500M"),
        ('[daemon]\nmetrics = "host:99999"', "is not an address to serve metrics at", "9464"),
        ("[defaults]\nmax_ptes_swap = true", "max_ptes_swap: True is not a whole number", ""),
    ],
)
def test_what_cannot_be_is_refused_with_its_place_and_what_may_be(text: str, message: str, help: str) -> None:
    error = refused(text)
    assert message in error.message
    assert help in error.help
    assert error.exit_code == 2


def test_every_error_of_a_file_is_reported_at_once_in_the_order_of_lines() -> None:
    error = refused(
        '[daemon]\ncpu = "much"\n[[rule]]\npolcy = 1\n'
        '[[rule]]\nmatch = { uid = -1, "a\\nb" = 2 }\n[tunables]\ndefrag = 2\n'
    )
    assert error.message == "rules.toml:2: daemon.cpu: 'much' is not a share"
    also = [line.split(": ", 1)[0] for line in error.help.splitlines()[1:]]
    assert also == [f"also rules.toml:{line}" for line in (3, 4, 6, 6, 8)]
    assert "did you mean 'policy'?" in error.help


def test_errors_beyond_a_number_are_counted() -> None:
    error = refused("[daemon]\n" + "".join(f"a{number} = 1\n" for number in range(50)))
    assert error.help.splitlines()[-1] == "and 30 more"


def test_the_line_is_that_of_the_rule_which_is_wrong() -> None:
    good = '[[rule]]\nmatch = { pid = 1 }\npolicy = "rfc"\n'
    assert refused(good + good.replace("1", "2").replace('"rfc"', '"no"')).message.startswith(
        "rules.toml:6: rule 2.policy"
    )


def test_a_file_that_cannot_be_read_is_a_refusal(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        load_configuration(tmp_path / "none.toml", X86_64)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not UTF-8 at byte 0"):
        load_configuration(tmp_path / "binary.toml", X86_64)


def test_what_is_set_goes_over_the_system_and_the_rest_stays_live() -> None:
    found = parsed('[tunables]\nmax_ptes_none = 7\n[switches]\n"64K" = "always"\n')
    system = Tunables.defaults(X86_64).replaced(X86_64, max_ptes_swap=3)
    assert found.tunables_over(system, X86_64) == system.replaced(X86_64, max_ptes_none=7)
    switches = found.switches_over(Switches.defaults(X86_64))
    assert switches.orders(advised=False) == (4,)
    assert parsed("").switches_over(Switches("never", {})) == Switches("never", {})


def test_defaults_hold_for_every_rule_that_does_not_say_otherwise() -> None:
    found = parsed('[defaults]\npolicy = "rfc"\nmax_pause = "250us"\n[[rule]]\nmatch = {}\npolicy = "pmd-only"\n')
    settings = found.rules.rules[0].settings
    assert (settings.policy, settings.max_pause_ns) == ("pmd-only", 250_000)


def written(directory: Path, **files: str) -> Path:
    """Return a directory of a configuration: `main` is mthp.toml, and all else is a file of conf.d."""
    (directory / "conf.d").mkdir()
    for name, contents in files.items():
        (directory / "mthp.toml" if name == "main" else directory / "conf.d" / f"{name}.toml").write_text(contents)
    return directory


def test_rules_of_conf_d_come_after_those_of_the_file_in_the_order_of_names(tmp_path: Path) -> None:
    rule = '[[rule]]\nname = "{}"\nmatch = {{ comm = "{}" }}\n'
    path = written(
        tmp_path,
        main='[defaults]\npolicy = "rfc"\n' + rule.format("first", "aa"),
        b="[tunables]\ndefrag = 0\n" + rule.format("third", "cc"),
        a="[daemon]\nnotice = '1s'\n[switches]\n64K = 'never'\n" + rule.format("second", "bb"),
    )
    for name in (".hidden.toml", "readme", "c.toml.dpkg-old"):
        (path / "conf.d" / name).write_text("not TOML")
    found = load_configuration(path, X86_64)
    assert [rule.name for rule in found.rules.rules] == ["first", "second", "third"]
    assert {rule.settings.policy for rule in found.rules.rules} == {"rfc"}
    assert (found.notice_ns, found.tunables, found.sizes) == (10**9, {"defrag": 0}, {4: "never"})


@pytest.mark.parametrize("files", [{"main": "[defaults]\n"}, {"only": "[defaults]\n"}])
def test_one_of_the_files_is_enough(files: dict[str, str], tmp_path: Path) -> None:
    assert load_configuration(written(tmp_path, **files), X86_64).rules.rules == ()


@pytest.mark.parametrize(
    ("main", "other", "key"),
    [
        ('[daemon]\ncpu = "1%"', '\n[daemon]\ncpu = "1%"', "daemon.cpu"),
        ("[tunables]\ndefrag = 1", "\n[tunables]\ndefrag = 0", "tunables.defrag"),
        ('[switches]\n64K = "never"', '\n[switches]\n65536 = "always"', "switches.65536"),
        ("[defaults]\nmax_ptes_none = 1", "\n[defaults]\nmax_ptes_none = 1", "defaults.max_ptes_none"),
    ],
)
def test_a_key_that_two_files_set_is_refused_with_both_places(main: str, other: str, key: str, tmp_path: Path) -> None:
    path = written(tmp_path, main=main, other=other)
    with pytest.raises(UsageError) as caught:
        load_configuration(path, X86_64)
    expected = f"{path}/conf.d/other.toml:3: {key} is set twice: {path}/mthp.toml:2 sets it, too"
    assert caught.value.message == expected


def test_an_error_names_its_file_and_line(tmp_path: Path) -> None:
    path = written(tmp_path, main="[defaults]", a="[[rule]]\nmatch = {}\npolcy = 1", b="\n[daemon]\ncpu = 1e400")
    with pytest.raises(UsageError) as caught:
        load_configuration(path, X86_64)
    assert caught.value.message.startswith(f"{path}/conf.d/a.toml:3: rule 1.polcy is an unknown key")


def test_rules_of_two_files_that_clash_are_refused(tmp_path: Path) -> None:
    rule = '[[rule]]\nname = "{}"\nmatch = {{}}\npolicy = "{}"\n'
    path = written(tmp_path, main=rule.format("a", "rfc"), b=rule.format("b", "mainline"))
    with pytest.raises(UsageError, match="rules 'a' and 'b' clash"):
        load_configuration(path, X86_64)


def test_a_directory_without_rules_is_refused_with_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has neither") as caught:
        load_configuration(tmp_path, X86_64)
    assert caught.value.help == f"write one: mthp daemon --print-config > {tmp_path}/mthp.toml"


def test_a_broken_link_in_conf_d_is_not_left_out(tmp_path: Path) -> None:
    path = written(tmp_path, main="[defaults]")
    (path / "conf.d" / "gone.toml").symlink_to(tmp_path / "nothing")
    with pytest.raises(UsageError, match=r"gone\.toml' cannot be read: No such file"):
        load_configuration(path, X86_64)


def test_the_daemon_reads_the_files_of_the_system_unless_an_option_names_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Not an argument: main() takes only what a user writes, and here no option names a file.
    monkeypatch.setattr(config, "DIRECTORY", tmp_path / "etc")
    assert main(["daemon", "--check-config"]) == 2
    assert f"no rules: {tmp_path}/etc does not exist" in capsys.readouterr().err
    (tmp_path / "etc").mkdir()
    written(tmp_path / "etc", main="[[rule]]\nmatch = {}", other="[[rule]]\nmatch = { pid = 1 }")
    assert main(["daemon", "--check-config"]) == 0
    assert capsys.readouterr().out.startswith("2 rules")
    assert main(["daemon", "--pid", "1", "--policy", "rfc", "--check-config"]) == 0
    assert capsys.readouterr().out.startswith("1 rule,")
    assert main(["daemon", "--policy", "rfc", "--check-config"]) == 2
    assert "etc and --policy are given" in capsys.readouterr().err


def test_the_option_for_a_user_takes_any_number_of_digits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["daemon", "--uid", "9" * 5000, "--check-config"]) == 0
    assert capsys.readouterr().out.startswith("1 rule,")


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("9464", ("127.0.0.1", 9464)),
        (":80", ("127.0.0.1", 80)),
        ("0.0.0.0:9464", ("0.0.0.0", 9464)),
        ("[::1]:9464", ("::1", 9464)),
        ("localhost", ("localhost", 9464)),
    ],
)
def test_metrics_are_on_the_loopback_unless_said_otherwise(text: str, endpoint: tuple[str, int]) -> None:
    assert parse_endpoint(text) == endpoint


@pytest.mark.parametrize("text", ["9" * 5000, "host:" + "9" * 5000, "host:\u0663", "host:0", "65536"])
def test_ports_that_there_are_not(text: str) -> None:
    with pytest.raises(UsageError, match="is not an address"):
        parse_endpoint(text)
