"""Taking a cut back: what `apply` keeps of the original, and how it is put together again."""
