"""Measuring a model: perplexity and retrieval over windows and scales, as rows of a Record.

`config` says what to measure, `documents` reads the text, `perplexity` and `retrieval` measure, `run` puts it
together.
"""
