"""Recovery of a pruned model by LoRA with a rank per layer, and its evaluation."""
