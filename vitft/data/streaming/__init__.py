"""Datasets that stay where they are: shards behind URLs, of which parts are fetched when they are needed."""
