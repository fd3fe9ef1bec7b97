"""Neural-network layers whose backward pass you can read."""

__version__ = "0.1.0"
