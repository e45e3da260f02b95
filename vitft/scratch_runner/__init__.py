"""The from-scratch ViT at work: trained on the data sets that fine-tuning uses."""
