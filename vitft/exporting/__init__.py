"""A trained model as a file for other runtimes, with a proof that it predicts the same."""
