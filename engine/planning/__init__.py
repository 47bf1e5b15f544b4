"""What a pre-training will need, before it starts: memory, time, energy, money, and the settings to choose."""
