"""What is asked: prompts with reference answers, and the tokenizer."""
