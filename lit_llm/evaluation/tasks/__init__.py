"""Benchmark tasks of the lm-evaluation-harness that read local files, and the functions they name.

A YAML file a task, in the harness's own format; what this project adds stands under ``metadata``
(see ``lit_llm.evaluation.suites``). The functions that a task names are imported by the harness.
"""
