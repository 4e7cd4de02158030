"""Files of models: safetensors and GGUF as byte ranges, and the fields that depend on depth."""
