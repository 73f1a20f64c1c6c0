"""How rows are stored, one form per file.

A reader module has ``FORM`` (one phrase for messages), ``claims(where) -> bool`` (cheap, looks at names only) and
``open_rows(where, split) -> Rows``. Names that begin with an underscore are helpers.
"""
