"""The shared core of the framework: config, data contracts, models, flow maths; its `commands` glue both sides."""

__version__ = "0.1.0"
