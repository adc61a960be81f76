"""The policy acting: models, KV-cached decoding, and the sampler role."""

from pathlib import Path
from runpy import run_path

run_path(str(Path(__file__).parents[1] / "cluster" / "own_packages.py"))["check"](__file__)
