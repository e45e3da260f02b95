"""The textbook at work: its chapters, trained on the data sets that fine-tuning uses."""
