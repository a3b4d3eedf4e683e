"""Writers of expressions: templates, and vision-language models."""
