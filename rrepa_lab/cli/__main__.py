"""`python -m rrepa_lab.cli`."""

import sys

from rrepa_lab.cli import main

sys.exit(main())
