"""The engine: from what lies in page tables to folios that are made of it, over any address space.

It knows no Linux call, no simulator and no file. In reading order:

- ``occupancy``, ``filled``: planes of bits over PMD ranges, and counts of every aligned run;
- ``policy``, ``checks``: which runs are full enough, and what stops an attempt at one;
- ``walk``, ``attempts``, ``pageorders``, ``plan``: the walk over many PMD ranges at once, and what it amounts to;
- ``select``: which mappings may be collapsed, and under which rules;
- ``planning``, ``space_plan``, ``census``: the plan of an address space, and what is in it now;
- ``admission``: which runs are tried, within a bloat budget and memory limits;
- ``collapse``, with ``options``, ``carry``, ``report``: carry out a plan once, and report the result;
- ``visit``: read, walk, admit, collapse, report, for the PMD ranges that are next;
- ``scanner``, ``khugepaged``: which ranges these are, and when: :class:`mthp.Khugepaged`, and the simulated machine's.
"""
