"""What Lightning lacks around a run: one clipping rule, and checkpoints that are whole or absent."""
