"""The recurrence over time, forward and backward, for the three standard cells.

``reference`` writes it in plain torch operations: the readable oracle, and the path for every
device without a fused kernel.
"""
