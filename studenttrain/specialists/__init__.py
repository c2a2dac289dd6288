"""A generalist and its specialists: classes that it confuses, a model for each cluster of them, and what all say.

Source: Hinton, Vinyals and Dean 2015, Distilling the Knowledge in a Neural Network, section 5.
"""
