"""`python -m obowlab.cli`, where the `obowlab` command is not on the path."""

import sys

from obowlab.cli import main

sys.exit(main())
