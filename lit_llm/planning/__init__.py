"""What a run will cost, and what the machine could do: FLOPs and peaks."""
