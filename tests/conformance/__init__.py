"""The conformance matrix: every optimizer of the registry times every promise, for every engine (design, section 7).

`subjects` says what is tested, `matrix` how promises are declared and gathered; the other modules hold the promises.
`tests/test_conformance.py` runs them; `tests/conformance_table.py` writes them down in `docs/conformance.md`.
"""
