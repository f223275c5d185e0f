"""Measurements: every figure that README and docs state, each made by one command (bench/README.md)."""
