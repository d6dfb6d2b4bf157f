"""Stored outputs of the public functions, which a refactor must not change; `python tests/golden/write.py` writes them."""
