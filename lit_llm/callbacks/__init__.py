"""What watches a run: exact resume, a graceful stop, throughput, samples, the report."""
