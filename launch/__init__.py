"""What a person runs: training, export, the demo, benchmarks."""
