"""Triton kernels for CUDA, one module per op. They are private: `lidnet_fast.functional` is the public face."""
