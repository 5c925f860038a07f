"""Sources: each lists rows (uri and captions) in a stable order; one file each."""
