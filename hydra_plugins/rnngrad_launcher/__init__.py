"""Launchers of rnngrad, here since Hydra looks for plugins nowhere else."""
