"""What Lightning's strategies lack: one clipping rule and checkpoints that are whole or absent."""
