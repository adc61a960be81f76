"""Rewards of images: scorers, features, moments, leave-one-out FID, and their roles."""

from pathlib import Path
from runpy import run_path

run_path(str(Path(__file__).parents[1] / "cluster" / "own_packages.py"))["check"](__file__)
