"""GGUF: language models written for llama.cpp, and read back."""
