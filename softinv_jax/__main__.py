"""`python -m softinv_jax` is `softinv`."""

import sys

from softinv_jax.command_line.main import main

sys.exit(main())
