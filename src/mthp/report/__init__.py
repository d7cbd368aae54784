"""`mthp report`: one HTML file that says what a process's memory is made of, and what each policy would make of it.

`gather` asks the library and gives a :class:`~mthp.report.document.Document`, a value of tables and pictures; `page`
renders that and nothing else. The page is one file: style, pictures and text, no script, no address of anything
outside, and a content security policy that says so to the browser. All its text goes through a template engine that
escapes, as names of processes, of files and of mappings are whatever somebody chose.

Pictures are SVG in the page itself. They follow the reader's light or dark, print as lines and not as dots, can be
read out, and cost a few kilobytes: a plotting library would give none of the first three, and needs forty megabytes.
"""

from mthp.report.document import Document
from mthp.report.page import load_template, render, write

__all__ = ["Document", "load_template", "render", "write"]
