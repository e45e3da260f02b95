"""Fine-tuning: `trainer` is the loop, in reading order; what it needs stands beside it."""
