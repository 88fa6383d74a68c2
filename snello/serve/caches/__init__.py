"""Answers that are not computed again: four kinds, from what is certain to what must prove itself first.

`flight.py`: identical requests in flight share one generation. `exact.py`: the very same request again, from disk.
`snello/engine/prefix_store.py`: prompts that begin alike. `similar.py`: questions that mean the same, off by default.
No HTTP here: a server calls these modules. What each guarantees, and what not, is in docs/cache.md.
"""
