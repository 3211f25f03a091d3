"""The tables of ``docs/compatibility.md``: what they say follows from the tests that ran.

``rows.py`` what the rows are; ``claims.py`` which tests prove which row; ``record.py`` which of
them have passed, where and when (``docs/compatibility-run.json``); ``page.py`` the page.
"""
