"""Scores and predictions of a trained model, and which images it may be scored on."""
