"""Shipped to vendors: the conformance laws and simulated devices."""
