"""The engine: read page tables, plan folios and have them made, over any address space.

It contains no Linux call, no simulator and no file. In reading order:

- ``bits``, ``occupancy``, ``filled``: planes of bits over PMD ranges, and counts of every aligned run;
- ``policy``, ``checks``: which runs are full enough, and what stops an attempt at one;
- ``walk``, ``attempts``, ``pageorders``, ``plan``: the walk over many PMD ranges at once, and its totals;
- ``select``: which mappings may be collapsed, and under which rules;
- ``planning``, ``space_plan``, ``census``: the plan of an address space, and its present contents;
- ``admission``: which runs are tried, within a bloat budget and memory limits;
- ``collapse``, with ``allowed``, ``carry``, ``report``: carry out a plan once, and report the result;
- ``visit``: read, walk, admit, collapse and report the next PMD ranges;
- ``scanner``, ``khugepaged``: choose these ranges and the time, for :class:`mthp.Khugepaged` and the simulated machine.
"""
