"""Publish a trained run as a Hugging Face folder and as GGUF files, and read such folders back.

- variants: which public architecture a model has, and the model rewritten into its plain form
- names: our path <-> the tensor's name elsewhere
- safetensors, hf, gguf: writers; importer: reader
- card: the model card, from the run's own records only
- check: load what was written and compare
- push: upload to the hub
"""
