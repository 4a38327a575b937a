"""Sources: read rows from files and datasets, and make token sequences with loss masks from them.

A row takes this way: `json_lines.py`, `parquet_rows.py` or `hub_dataset.py` parse it, `source.py` passes it through the
user's adapter, `sequence_maker.py` makes sequences of it by way of `chat_template.py`.
"""
