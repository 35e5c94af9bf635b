"""DeepPrune inside a real SGLang server: sample many, stop what is redundant, vote once."""

__version__ = "0.1.0"
