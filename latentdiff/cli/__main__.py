"""`python -m latentdiff.cli` is `latentdiff`."""

import sys

from latentdiff.cli import main

sys.exit(main())
