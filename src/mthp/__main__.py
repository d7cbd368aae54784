"""Lets ``python -m mthp`` run the command line."""

import sys

from mthp.cli import main

sys.exit(main())
