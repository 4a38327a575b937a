"""Sources: read rows from files and datasets, and make token sequences with loss masks from them.

The path of a row: `json_lines.py`, `parquet_rows.py` or `hub_dataset.py` parses it, `source.py` passes it to the user's
adapter, and `sequence_maker.py` makes sequences from it with `chat_template.py`.
"""
