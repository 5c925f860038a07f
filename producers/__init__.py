"""Ray actors that load, filter and encode images and captions into the shards of a data set directory."""
