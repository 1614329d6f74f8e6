"""Cases on disk and in memory: found by layouts, checked by validation, made ready by preprocessing."""
