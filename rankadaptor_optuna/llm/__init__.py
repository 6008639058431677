"""Language models and text, without training: linear modules that LoRA can adapt, layers and their costs, data."""
