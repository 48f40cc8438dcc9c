"""The conformance suite's parts. Its public face is `longspan.kernels.testing`."""
