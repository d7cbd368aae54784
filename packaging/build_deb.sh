#!/bin/sh
# Build the Debian package: packaging/build_deb.sh PYTHON [DIRECTORY]. PYTHON has mthp, click-man and hatchling; DIRECTORY is dist by default.
# The package depends on Debian's Python, NumPy, click and rich (Debian 12 and later).
set -eu
python=$1
cd "$(dirname "$0")/.."
out=${2:-dist}
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
chmod 755 "$tree"
version=$("$python" -c 'import mthp; print(mthp.__version__)')

"$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --no-build-isolation \
  --target "$tree/usr/lib/python3/dist-packages" .
rm -rf "$tree/usr/lib/python3/dist-packages/bin"
# This file names the directory of the build. Debian has its own list of a package's files.
rm -f "$tree"/usr/lib/python3/dist-packages/mthp-*.dist-info/direct_url.json

mkdir -p "$tree/usr/bin" "$tree/usr/lib/systemd/system" "$tree/etc/mthp/conf.d" "$tree/usr/share/man/man1" \
  "$tree/usr/share/doc/mthp/examples" "$tree/DEBIAN"
printf '#!/usr/bin/python3 -P\nimport sys\n\nfrom mthp.cli import main\n\nsys.exit(main())\n' > "$tree/usr/bin/mthp"
# The example's rules are comments in the package, because an enabled service must work only on processes that an administrator chose.
"$python" -m mthp daemon --print-config | sed '/^\[\[rule\]\]/,$ s/^\([^#]\)/# \1/' > "$tree/etc/mthp/mthp.toml"
"$python" packaging/unit.py > "$tree/usr/lib/systemd/system/mthp.service"
"$python" docs/man.py "$tree/usr/share/man/man1" > /dev/null
gzip -9n "$tree"/usr/share/man/man1/*.1
gzip -9nc CHANGELOG.md > "$tree/usr/share/doc/mthp/changelog.gz"
for shell in bash zsh fish; do
  case $shell in
    bash) file=bash-completion/completions/mthp ;;
    zsh) file=zsh/vendor-completions/_mthp ;;
    fish) file=fish/vendor_completions.d/mthp.fish ;;
  esac
  mkdir -p "$tree/usr/share/${file%/*}"
  "$python" -m mthp completion $shell > "$tree/usr/share/$file"
done
cp LICENSE "$tree/usr/share/doc/mthp/copyright"
cp packaging/grafana/*.json packaging/prometheus/*.yaml "$tree/usr/share/doc/mthp/examples/"

sed "s/@VERSION@/$version/" packaging/debian/control > "$tree/DEBIAN/control"
echo "Installed-Size: $(du -sk "$tree/usr" | cut -f1)" >> "$tree/DEBIAN/control"
echo /etc/mthp/mthp.toml > "$tree/DEBIAN/conffiles"
cp packaging/debian/postinst packaging/debian/prerm packaging/debian/postrm "$tree/DEBIAN/"
find "$tree" -type d -exec chmod 755 {} +
find "$tree" -type f -exec chmod 644 {} +
chmod 755 "$tree/DEBIAN/postinst" "$tree/DEBIAN/prerm" "$tree/DEBIAN/postrm" "$tree/usr/bin/mthp"
(cd "$tree" && find usr -type f -exec md5sum {} + > DEBIAN/md5sums)
mkdir -p "$out"
dpkg-deb --root-owner-group --build "$tree" "$out/mthp_${version}_all.deb"
