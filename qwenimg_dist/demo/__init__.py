"""The demo's generated pictures and their captions."""
