"""Print the systemd unit of a package: the program is /usr/bin/mthp, the rules are those below /etc/mthp."""

from mthp.daemon.systemd import unit_text

print(unit_text([], program=["/usr/bin/mthp"]), end="")
