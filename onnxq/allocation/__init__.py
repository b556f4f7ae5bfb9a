"""Spending a budget of bits over the weights of a model."""
