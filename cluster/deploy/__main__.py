"""`python -m cluster.deploy kuberay --preset NAME --gpus 8`: deployment files for a run."""

import sys

from cluster.program.start import run_command

sys.exit(run_command("cluster.deploy"))
