"""What several benchmarks share: peers, shapes, rules of pruning, answers, progress and reports."""
