"""Scripts that measure: each prints ratios against a named peer, both timed in one run."""
