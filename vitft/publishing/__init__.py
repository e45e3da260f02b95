"""A trained model, given to others."""
