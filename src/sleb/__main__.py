"""`python -m sleb`."""

import sys

from sleb.cli.main import main

sys.exit(main())
