"""Print the systemd unit of a package: the program is /usr/bin/mthp, the rules are /etc/mthp/mthp.toml."""

from mthp.daemon.unit import unit_text

print(unit_text(["--config", "/etc/mthp/mthp.toml"], program=["/usr/bin/mthp"]), end="")
