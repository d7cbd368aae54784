"""The kernel lab: real kernels in virtual machines, to compare the simulated machine and test ``mthp``.

Run it as ``python -m vm`` with ``tests`` on the path (``make vm``, ``make vm-fuzz``). It takes QEMU, a C compiler for
the guest's architecture, and a Debian machine with package sources, from which it fetches kernels:

==============  ==================================================================================================
`apt`           kernel and program packages, by a second apt beside the machine's; apt checks the signatures
`kernels`       the available kernels, and an unpacked one
`cpio`          the archive that a kernel unpacks as its first file system
`initramfs`     that file system: busybox, modules, the recorder, and an init that runs one job
`world`         a disk with Python and the packages that mthp and its tests need
`guest`         a machine under QEMU: boots, talks, brings files back, and ends in time whatever the guest does
`recorder`      stages memory in a guest, lets khugepaged work, and records the result: golden cases
`cases`         cases to record: random, and smaller variants of one
`fuzz`          real against simulated for a time; a case that differs is made small and saved
`matrix`        mthp's own tests and commands on each kernel
`smoke`         in a guest: every command, once, on a target that checks its own contents
`telling`       in a guest: a plugin of pytest that sends every test to the host, through a `port`
`selftest`      Linux's own test of khugepaged, with the daemon in khugepaged's place
`tools`         emulators and compilers, installed automatically; programs of this machine for a guest
==============  ==================================================================================================

Nothing here is part of the installed package. The tree receives only requested output; packages, unpacked kernels and
disks are in ``$XDG_CACHE_HOME/mthp-vm``.
"""
