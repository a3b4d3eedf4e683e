"""Questions to vision-language models and their answers: endpoint, local model, cache, budget."""
