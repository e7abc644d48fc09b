"""Networks by type. A module of this package that a recipe can name has a `Config`, and `build(config) -> nn.Module`.

A module whose networks have a layout of their own on disk (transformers, diffusers) has also
`load(path, config, dtype) -> nn.Module`; the others are stored as `config.json` and `model.safetensors`.
"""
