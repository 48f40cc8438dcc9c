"""Our decoders in lm-evaluation-harness."""
