"""Settings: what each is made of, `TrainConfig` with all of a training run's, and recipes that set several at once."""
