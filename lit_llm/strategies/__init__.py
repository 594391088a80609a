"""What Lightning lacks around a run: one clipping rule, whole checkpoints, memory kept on a CPU."""
