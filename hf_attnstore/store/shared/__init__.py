"""A tier that machines share, on an engine that exists: who speaks to the engine, and the tier that uses it."""
