"""Encoders: multi-head attention and a two-layer FFN, one small file for each architecture."""
