"""Measuring: the machine and its ceilings, the text, quality, speed and memory. Decides nothing, prints
nothing.
"""
