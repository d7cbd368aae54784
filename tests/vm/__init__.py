"""The kernel lab: real kernels in virtual machines, to hold the simulated machine and ``mthp`` itself against.

Run it as ``python -m vm`` with ``tests`` on the path (``make vm``, ``make vm-fuzz``). It takes QEMU, a C compiler for
the guest's architecture, and a Debian machine, whose own package sources it fetches kernels from:

==============  ==================================================================================================
`apt`           kernel and program packages, by an apt of our own beside the machine's; apt checks the signatures
`kernels`       which kernels there are, and an unpacked one
`cpio`          the archive that a kernel unpacks as its first file system
`initramfs`     that file system: busybox, modules, the recorder, and an init that runs one job
`world`         a disk with Python and the packages that mthp and its tests need
`guest`         a machine under QEMU: boots, talks, brings files back, and ends in time whatever the guest does
`recorder`      stages memory in a guest, lets khugepaged work, and tells what came of it: golden cases
`cases`         cases to record: random, and smaller variants of one
`fuzz`          real against simulated, until a minute is over; what differs is made small and saved
`matrix`        mthp's own tests and commands on each kernel
`smoke`         in a guest: every command, once, on a target that checks its own contents
`telling`       in a guest: a plugin of pytest that tells the host of every test, through a `port`
`selftest`      Linux's own test of khugepaged, with the daemon in khugepaged's place
`tools`         emulators and compilers, installed without asking; programs of this machine for a guest
==============  ==================================================================================================

Nothing here is part of the installed package, and nothing is written into the tree but what is asked for: packages,
unpacked kernels and disks live in ``$XDG_CACHE_HOME/mthp-vm``.
"""
