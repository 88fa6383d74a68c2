"""Running a model here: lowering, pages, scheduling, generation.

`native.py` lowers a `Spec` to a program of the C++ core, `engine.py` runs many requests on it at once, and `llm.py` is
the face that people use. The package reads a `Spec` and a `Deployment` and never asks how a model was made.
"""
