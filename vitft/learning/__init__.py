"""The course on fine-tuning: lessons as notebooks."""
