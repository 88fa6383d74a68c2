"""Blocks of README.md and docs/, each made of one file of benchmarks/results; a module a subject."""
