"""`python -m compute_tools`."""

import sys

from compute_tools.main import main

sys.exit(main())
