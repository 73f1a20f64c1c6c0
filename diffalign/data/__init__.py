"""Preference data: reading it (``open.open_pairs``), checking it (``validate``), encoding it once (``cache``)."""
