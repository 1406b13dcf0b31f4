"""Prompts with reference answers, and the tokenizer."""
