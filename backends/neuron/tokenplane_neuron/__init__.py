"""Tokenplane on AWS Neuron."""

__version__ = "0.1.0"
