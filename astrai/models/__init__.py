"""What is computed: configuration, weights, tokenizer and the one decoder of all families."""
