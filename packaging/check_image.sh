#!/bin/sh
# Run the container image, and collapse the memory of a process of the host from it: packaging/check_image.sh IMAGE ENGINE.
# Needs root, python3, and docker or podman. ENGINE may have options: "podman --runtime=runc".
set -eu
image=$1
engine=$2
run() { $engine run --rm --network=none --ulimit nofile=1024 --ulimit nproc=1024 "$@"; }

run --entrypoint sh "$image" -ec '
  mthp --version
  for command in $(python -c "from mthp.cli import COMMANDS; print(*COMMANDS)"); do mthp "$command" --help > /dev/null; done
  mthp simulate --print-scenario | sed "s/^duration = .60s./duration = \"5s\"/" > /tmp/scenario.toml
  mthp simulate /tmp/scenario.toml > /dev/null'

python3 -c 'import mmap, time; memory = mmap.mmap(-1, 64 << 20, mmap.MAP_PRIVATE); memory.write(b"x" * len(memory)); time.sleep(600)' &
target=$!
trap 'kill "$target"' EXIT
sleep 3
on_host() { run --pid=host --cap-add=SYS_PTRACE --cap-add=SYS_ADMIN --cap-add=SYS_NICE --cap-add=DAC_OVERRIDE "$image" "$@"; }
! on_host verify "$target" --expect '2M>=10%' || { echo "the target has huge pages already: set THP to madvise" >&2; exit 1; }
# Parts of the program lie in no whole PMD range, which is exit code 1.
on_host collapse "$target" --orders 2M --mechanism madvise || [ $? -eq 1 ]
on_host verify "$target" --expect '2M>=80%'
echo "$image works"
