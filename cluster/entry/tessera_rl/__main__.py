"""`python -m tessera_rl`, where the command is not on PATH."""

import sys

from tessera_rl import main

sys.exit(main())
