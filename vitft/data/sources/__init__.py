"""From a name or a path to columns `image` and `label`: folders, tables, archives, parquet, the hub."""
