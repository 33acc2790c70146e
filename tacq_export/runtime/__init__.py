"""Our llama.cpp: fetched, built, found and called."""
