"""Programs that run in a peer's own environment: the standard library, NumPy and that peer; never the rest of snello.

They are started by the path of their file: `worker.py` with the path of an engine's file.
"""
