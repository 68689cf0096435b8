"""vft: fine-tuning of video language models in plain PyTorch."""

__version__ = "0.1.0"
