"""Read the capabilities of this process, and explain how to get a missing one (capabilities(7), user_namespaces(7)).

This explains a refusal; only a trial shows what is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mthp.linux.process import status_fields

CAP_SYS_PTRACE = 19
CAP_SYS_ADMIN = 21
CAP_SYS_NICE = 23
"""Bits of ``CapEff``: include/uapi/linux/capability.h."""

CAPABILITY_NAMES = {CAP_SYS_PTRACE: "CAP_SYS_PTRACE", CAP_SYS_ADMIN: "CAP_SYS_ADMIN", CAP_SYS_NICE: "CAP_SYS_NICE"}
_EVERY_UID = ["0", "0", "4294967295"]


@dataclass(frozen=True, slots=True)
class Rights:
    """The capabilities of a process.

    Attributes:
        fsuid: the user as which it opens files and reads processes; -1 if unknown.
        effective: bits of the capabilities that it has in its own user namespace.
        in_first_namespace: whether that is the first one, according to its map of user IDs.
    """

    fsuid: int
    effective: int
    in_first_namespace: bool

    @classmethod
    def read(cls, directory: Path) -> Rights:
        """Return those of the process with this directory in proc; none where it cannot be read."""
        try:
            fields = status_fields((directory / "status").read_bytes())
            uid_map = (directory / "uid_map").read_text().split()
        except OSError:
            return cls(-1, 0, False)
        # The fourth is the filesystem UID, by which access to files and processes is checked (proc_pid_status(5)).
        return cls(int(fields["Uid"].split()[3]), int(fields["CapEff"], 16), uid_map == _EVERY_UID)

    def has(self, capability: int) -> bool:
        """Return whether it has `capability`, perhaps only in its own user namespace."""
        return bool(self.effective >> capability & 1)

    def how_to_have(self, capability: int) -> str:
        """Return the remedy where the kernel refused an operation that needs `capability`."""
        name = CAPABILITY_NAMES[capability]
        if not self.has(capability):
            return f"{name} (run as root; in a container --cap-add={name.removeprefix('CAP_')})"
        # Effective in a namespace of its own: the kernel asks for it in the first one (capable(), kernel/capability.c).
        if not self.in_first_namespace:
            return f"{name} in the first user namespace: this process has it in its own only"
        return f"{name} is there: a seccomp filter or security module refuses; run outside of it"
