"""Discrete tokenizers: pictures to codes and back."""
