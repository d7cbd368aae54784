"""The entry point of ``python -m mthp``."""

import sys

from mthp.cli import main

sys.exit(main())
