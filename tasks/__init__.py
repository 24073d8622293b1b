"""The tasks, one file each; imported as ``rnngrad.tasks``."""

if __name__ == "tasks":
    raise ImportError("import rnngrad.tasks, not tasks: two names would make two copies of a class")
