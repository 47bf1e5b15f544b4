"""DeepSpeed configurations by ZeRO stage: only what DeepSpeed alone owns."""
