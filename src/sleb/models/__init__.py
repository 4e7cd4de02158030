"""Everything that knows transformers: finding, loading, running and describing models."""
