"""`mthp top`: processes by what a collapse could gain, on a terminal that keeps itself up to date.

A host has thousands of processes, and looking at one costs time in proportion to its memory. So there are three looks,
each dearer than the one before and taken of fewer: ``statm`` of everybody, ``smaps_rollup`` of the largest, a plan of
those on the screen (:mod:`~mthp.top.survey`). They are taken in one thread of its own, which rests so much between them
that it never uses more than its share of a processor. The screen (:mod:`~mthp.top.app`) shows what is known and waits
for nobody.

On a target (a process, a snapshot, a recording) the rows are its mappings; a recording can be gone through in time.
"""
