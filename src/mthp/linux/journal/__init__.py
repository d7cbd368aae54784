"""The undo log of everything that mthp changes on a machine (:mod:`~mthp.linux.journal.switches`)."""
