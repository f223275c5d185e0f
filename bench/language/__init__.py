"""Perplexity and multiple choice of pruned language models."""
