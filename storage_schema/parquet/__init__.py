"""Parquet files of strangers: what their footers and page headers say, judged before Arrow reads them."""
