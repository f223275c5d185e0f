"""Latency and memory on the CPU."""
