"""One file per command; the only place that knows both sides and Ray Train."""
