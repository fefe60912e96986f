"""A pretrained model and a labelled task -> a fine-tuned model, its score and its predictions."""
