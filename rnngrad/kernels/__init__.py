"""The recurrence over time, forward and backward, for the three standard cells.

``reference`` writes it in plain torch operations, for every device.
"""
