"""`mthp report`: one HTML file on what a process's memory consists of and what each policy would do with it.

`gather` makes a :class:`~mthp.report.document.Document`, a value of tables and pictures; `page` renders that and
nothing else. The page is one file of style, pictures and text. It has no script and no outside address.

Pictures are inline SVG: they follow the reader's light or dark theme, print as lines, are accessible to screen readers,
and cost a few kilobytes. A plotting library offers none of the first three, and needs forty megabytes.
"""

from mthp.report.document import Document
from mthp.report.page import html_of, load_template, write

__all__ = ["Document", "html_of", "load_template", "write"]
