"""`python -m learner.rollouts RUN --sort clip`: stored rollouts, their images and rewards."""

import sys

from cluster.program.start import run_command

sys.exit(run_command("learner.rollouts"))
