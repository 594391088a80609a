"""What Lightning lacks around a run: one clipping rule, checkpoints that are whole or absent."""
