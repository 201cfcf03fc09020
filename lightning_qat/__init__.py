"""Quantization-aware training for PyTorch Lightning."""
