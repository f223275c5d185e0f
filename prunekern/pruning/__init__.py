"""A masked model in training: attach, budget, saliency, rules for final masks, adapters in and out."""
