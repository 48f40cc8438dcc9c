"""The fused attention kernels in Triton. Importing this package imports triton; `longspan.kernels.attention.flash` does
so on first use."""
