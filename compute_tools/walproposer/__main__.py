"""``python -m compute_tools.walproposer``."""

import sys

from compute_tools.walproposer.main import main

sys.exit(main())
