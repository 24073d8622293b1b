"""Which runs a sweep has. The folder above is Hydra's: it looks for sweepers nowhere else."""
