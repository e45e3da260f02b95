"""What a run takes: `estimate` tries out steps, `autotune` and `dry_run` use that; `throughput` and `bench` measure."""
