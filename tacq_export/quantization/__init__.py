"""Matrices to codes: GPTQ, coordinate descent, and what is tuned afterwards."""
