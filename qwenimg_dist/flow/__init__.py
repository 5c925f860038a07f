"""Flow matching: path and targets, sigma sampling and shift, samplers."""
