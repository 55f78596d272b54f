"""Columns of texts in Arrow and Parquet files, whose compressed parts are measured before they are read."""
