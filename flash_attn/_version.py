"""The version, stated once: `pyproject.toml` and the changelog are checked against it.

It is exactly the published 2.8.3, because other projects accept a window of versions in which
`2.8.3.post1` or `2.8.3+local` would already be too new.
"""

__version__ = "2.8.3"
