"""`reir finetune`: trains the model of a gallery on sentences about its photos."""
