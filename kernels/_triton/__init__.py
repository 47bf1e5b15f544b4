"""What the Triton kernels share. Importing this package imports no triton; its `tiles` module does."""
