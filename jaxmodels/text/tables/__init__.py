"""Columns of texts in Arrow and Parquet files, which Arrow reads in a child process with limits."""
