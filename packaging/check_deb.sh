#!/bin/sh
# Install the Debian package in a bare system, and run it there: packaging/check_deb.sh PACKAGE [SUITE [MIRROR]]. The suite is trixie by default.
# Needs root and debootstrap. Recommended packages are left out, because only some commands may need them.
set -eu
package=$1
suite=${2:-trixie}
root=$(mktemp -d)
trap 'umount "$root/proc" 2>/dev/null || true; rm -rf --one-file-system "$root"' EXIT

debootstrap --variant=minbase --include=python3,python3-numpy,python3-click,python3-rich "$suite" "$root" ${3:+"$3"} > "$root.log" 2>&1 ||
  { tail -n 3 "$root.log"; exit 1; }
rm -f "$root.log"
mount -t proc proc "$root/proc"
cp "$package" "$root/mthp.deb"
inside() { chroot "$root" "$@"; }

inside dpkg -i /mthp.deb
inside mthp --version
for command in $(inside python3 -c 'from mthp.cli import COMMANDS; print(*COMMANDS)'); do
  inside mthp "$command" --help > /dev/null
done
inside mthp simulate --print-scenario > "$root/scenario.toml"
sed -i 's/^duration = "60s"/duration = "5s"/' "$root/scenario.toml"
inside mthp simulate /scenario.toml
inside mthp daemon --check-config
inside mthp snapshot self -o /self.mthp
inside mthp plan /self.mthp > /dev/null
inside dpkg --verify mthp
inside dpkg --purge mthp
left=$(find "$root" -xdev -path '*/mthp*' ! -name 'mthp.deb' ! -name '*.mthp' ! -path "$root/proc/*")
[ -z "$left" ] || { echo "left behind: $left"; exit 1; }
echo "$package works on a bare $suite"
