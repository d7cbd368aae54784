"""`mthp top`: a live table of processes, by the memory that a collapse could bring into larger folios.

A host has thousands of processes, and reading one costs time in proportion to its memory. So there are three looks,
each more expensive and applied to fewer processes: ``statm`` of all, ``smaps_rollup`` of the largest, a plan of those
on the screen (:mod:`~mthp.top.survey`). One thread takes them, and rests between them to keep within its share of a
processor. The screen (:mod:`~mthp.top.app`) shows the known values and never waits.

On a target (a process, a snapshot, a recording) the rows are its mappings; keys step through a recording in time.
"""
