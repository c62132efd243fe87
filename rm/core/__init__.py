"""The part that decides. Pure: standard library only, no clock, no randomness, no I/O.

Start with `state.py` (what is true) and `cycle.py` (what to do next).
"""
