"""Datasets that stay where they are: parquet shards behind URLs, of which parts are fetched when they are needed."""
