"""transformers' Trainer with the two stages of pruning, and the recipe that the command line follows."""
