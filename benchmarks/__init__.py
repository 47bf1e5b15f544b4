"""Timings of whole steps, operators, masks and pictures, each checked for its result before it is timed."""
