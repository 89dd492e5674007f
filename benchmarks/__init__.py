"""Measurements of speed and memory; `python benchmarks/throughput.py --help` is the door."""
