"""The daemon: khugepaged in user space, aimed by an operator.

khugepaged goes through the memory of all processes at one pace. The daemon goes through that of chosen ones
(:mod:`~mthp.daemon.rules`, read from a file by :mod:`~mthp.daemon.configuration`), and where there is something to do:

- New processes are told by the kernel or looked for (:mod:`mthp.linux.procevents`), let settle
  (:mod:`~mthp.daemon.discovery`), and matched (:mod:`~mthp.daemon.finder`).
- Each that a rule fits is a :class:`~mthp.daemon.target.Target`: looked at cheaply, gone through when it has changed
  (:mod:`~mthp.daemon.onepass`), with what is finished remembered (:mod:`~mthp.daemon.ledger`). What is collapsed, and
  how, is the engine's matter (:mod:`mthp.engine.visit`).
- One thread works on targets in turn (:mod:`~mthp.daemon.worker`), within budgets (:mod:`mthp.pacing`) and as the
  machine has memory (:mod:`~mthp.daemon.pressure`), under switches and tunables that are followed live
  (:mod:`~mthp.daemon.system`).
- The main thread (:mod:`~mthp.daemon.service`, around :mod:`~mthp.daemon.loop`) obeys: signals, and the socket of
  ``mthp status``, ``pause`` and ``resume`` (:mod:`~mthp.daemon.control`).
- What was done is counted (:mod:`~mthp.daemon.counters`), and told as metrics, as events, and to the service manager.

All parts take a clock and can be tried without a process, a kernel or the time passing.
"""
