"""Direct Preference Optimization of Hugging Face causal language models on one GPU or many."""

__version__ = "0.1.0"
