"""From logits to tokens: the general sampler, which every faster path agrees with."""
