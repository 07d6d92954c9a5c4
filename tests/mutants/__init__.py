"""Faults planted in our kernels and passes, one at a time: the tests must see each of them.

`python -m tests.mutants` runs them (hours on a laptop; it can be stopped and continued) and writes
docs/mutants.json and docs/mutants.md. Continuous integration only checks that the table fits the
sources and the page fits the results (tests/test_mutants.py).
"""
