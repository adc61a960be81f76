"""`python -m rewards.reference --images photos --out ref.npz`, or `... fetch imagenet256`."""

import sys

from cluster.program.start import run_command

sys.exit(run_command("rewards.reference"))
