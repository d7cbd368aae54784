"""The daemon: khugepaged in user space, for processes that an operator chooses.

khugepaged scans the memory of all processes at one pace. The daemon scans that of chosen ones
(:mod:`~mthp.daemon.rules`, read from files by :mod:`~mthp.daemon.config`), and only changed memory:

- New processes come from the kernel's events or a list (:mod:`mthp.linux.procevents`), are left to settle, and are
  matched (:mod:`~mthp.daemon.processes`).
- Each process that fits a rule is a :class:`~mthp.daemon.target.Target`: checked cheaply, scanned when it has changed
  (:mod:`~mthp.daemon.pass_`), with finished ranges remembered (:mod:`~mthp.daemon.ledger`) and more between two passes
  (:mod:`~mthp.daemon.target_state`). The engine decides what is collapsed, and how (:mod:`mthp.engine.visit`).
- One thread works on targets in turn (:mod:`~mthp.daemon.worker`), within budgets (:mod:`mthp.pacing`), the machine's
  free memory (:mod:`~mthp.daemon.pressure`) and a rule's eagerness (:mod:`~mthp.daemon.eagerness`), under the current
  switches and tunables (:mod:`~mthp.daemon.kernel_settings`). What targets share is in
  :mod:`~mthp.daemon.environment`.
- The main thread (:mod:`~mthp.daemon.service`, around :mod:`~mthp.daemon.loop`) serves signals, and the socket of
  ``mthp status``, ``pause`` and ``resume`` (:mod:`~mthp.daemon.ipc`).
- The work is counted and logged (:mod:`~mthp.daemon.telemetry`), shown as metrics (:mod:`~mthp.daemon.exporter`), and
  reported to the service manager (:mod:`~mthp.daemon.systemd`).

All parts take a clock as an argument, so tests need neither a process, nor a kernel, nor real time.
"""
