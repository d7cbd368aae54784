"""The daemon: khugepaged in user space, for processes that an operator chooses.

khugepaged scans the memory of all processes at one pace. The daemon scans that of chosen ones
(:mod:`~mthp.daemon.rules`, read from a file by :mod:`~mthp.daemon.config`), and only changed memory:

- New processes come from the kernel's events or a list (:mod:`mthp.linux.procevents`), are left to settle
  (:mod:`~mthp.daemon.processes`), and are matched (:mod:`~mthp.daemon.processes`).
- Each process that fits a rule is a :class:`~mthp.daemon.target.Target`: checked cheaply, scanned when it has changed
  (:mod:`~mthp.daemon.pass_`), with finished ranges remembered (:mod:`~mthp.daemon.ledger`). The engine decides what
  is collapsed, and how (:mod:`mthp.engine.visit`).
- One thread works on targets in turn (:mod:`~mthp.daemon.worker`), within budgets (:mod:`mthp.pacing`) and the
  machine's free memory (:mod:`~mthp.daemon.pressure`), under the current switches and tunables
  (:mod:`~mthp.daemon.kernel_settings`).
- The main thread (:mod:`~mthp.daemon.service`, around :mod:`~mthp.daemon.loop`) serves signals, and the socket of
  ``mthp status``, ``pause`` and ``resume`` (:mod:`~mthp.daemon.ipc`).
- The work is counted (:mod:`~mthp.daemon.telemetry`), and reported as metrics, as events, and to the service manager.

All parts take a clock as an argument, so tests need neither a process, nor a kernel, nor real time.
"""
