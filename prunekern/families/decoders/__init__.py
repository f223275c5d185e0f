"""Decoders: grouped-query attention with rotary positions and a gated FFN, one small file for each architecture."""
