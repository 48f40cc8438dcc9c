"""The `hopper` backend: attention in Triton Gluon for sm_90."""
