"""Positions: frequency methods, training placements, scale draws and the choice of scale at inference.

Pure: knows no model, no file and no server. Submodules are imported by name, so that a caller that only parses a
recipe does not pay for torch.
"""
