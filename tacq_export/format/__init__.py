"""The byte format: types, blocks, sparse sections, GGUF files. Pure: no model, no torch module."""
