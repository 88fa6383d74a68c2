"""Running a model here: lowering, pages, sessions, generation.

`native.py` lowers a `Spec` to a program of the C++ core; `llm.py` is the face that people use. The package reads a
`Spec` and a `Deployment` and never asks how a model was made.
"""
