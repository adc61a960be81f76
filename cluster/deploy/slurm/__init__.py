"""Slurm: a job's script for one node or many, and a script for commands beside it."""
