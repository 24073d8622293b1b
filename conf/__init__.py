"""The configuration: ``pkg://rnngrad.conf`` for Hydra. The yaml holds every default."""
