"""Other engines on the same machine: where they live, what they are fed, how they are measured in turn, who was faster.

Every peer runs in an environment of its own (`environments.py`), on a conversion of the same checkpoint
(`conversions.py`), in a process that speaks a protocol of lines (`inside/worker.py`). `turns.py` lets them run in
turn, `judge.py` compares, and `comparison.py` is the whole of it. `latency.py` is another question: what our own
original is worth beside Transformers.
"""
