"""How good a file is: KL divergence, perplexity, the score of a benchmark, and stock files beside ours."""
