"""Other libraries: the table of what they mean (`rows.py`), and its readers."""
