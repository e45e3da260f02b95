"""Datasets by name or path: folders, tables, archives, parquet and the hub as columns `image` and `label`."""
