"""Try out settings of training: what is varied, the trials of several processes, and what came of them."""
