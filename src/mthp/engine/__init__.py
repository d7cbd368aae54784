"""The engine: occupancy of PMD ranges, policies, and the plans that they make.

Knows no Linux call, no simulator and no file: it sees planes of bits and gives back orders.
"""
